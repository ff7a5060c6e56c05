//! Stopping and starting, at any moment, with any number of vCPUs; and without an allocation.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, mpsc};

use colo_driver_kvm::boot::Boot;
use colo_driver_kvm::caps::Host;
use colo_driver_kvm::checkpoint::Passes;
use colo_driver_kvm::device::{BusDevice, Irq, Serial, Sink};
use colo_driver_kvm::dirty::DirtyMode;
use colo_driver_kvm::vcpu::VcpuEvent;
use colo_driver_kvm::vm::{Vm, VmConfig};
use colo_proto::id::PageRuns;
use colo_proto::ram::PageSet;
use rustix::event::{PollFd, PollFlags, poll};

use common::{Walk, await_visits, contradictions, host, machine, visits};

/// Counts this thread's allocations.
struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: hands everything to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _gone = COUNT.try_with(|c| c.set(c.get() + 1));
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn nothing_is_allocated_between_stop_and_run() {
    let Some(host) = host() else { return };
    for dirty in [DirtyMode::Bitmap, DirtyMode::Ring(65_536)] {
        let config = VmConfig {
            dirty,
            ..VmConfig::default()
        };
        let mut vm = machine(&host, &config, Walk::default());
        vm.start_tracking().unwrap();
        vm.resume().unwrap();
        let mut set = PageSet::new(&vm.memory().shape());
        vm.harvest(&mut set).unwrap();
        let mut checkpoint = vm.checkpoint(4000).unwrap();
        let none = PageRuns::new();
        for round in 0..6 {
            let count = visits(&vm, 0);
            await_visits(&vm, 0, count + 1000);
            let passes = if round % 2 == 0 {
                Passes::Two
            } else {
                Passes::One
            };
            let before = COUNT.get();
            vm.capture(&mut checkpoint, &none, true, passes, &mut || {})
                .unwrap();
            let allocated = COUNT.get() - before;
            // The first one grows the buffers. Not even the live pass allocates after.
            assert!(round == 0 || allocated == 0, "{allocated} allocations");
        }
    }
}

#[test]
fn kicks_at_any_moment_lose_no_step_of_the_guest() {
    let Some(host) = host() else { return };
    let mut vm = machine(&host, &VmConfig::default(), Walk::default());
    for round in 0..3000u32 {
        vm.resume().unwrap();
        // From "not in the guest yet" to "long inside".
        for _ in 0..(round % 64) * 50 {
            std::hint::spin_loop();
        }
        vm.pause();
        assert!(!vm.running());
    }
    assert_eq!(contradictions(&vm), []);
    assert_eq!(vm.take_events(), []);
    vm.resume().unwrap();
    let count = visits(&vm, 0);
    await_visits(&vm, 0, count + 1000);
}

/// Remembers what the guest wrote; a read gives the number of reads.
#[derive(Default)]
struct Counter {
    reads: u32,
    writes: Vec<u32>,
}

impl BusDevice for Counter {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        self.reads += 1;
        data.copy_from_slice(&self.reads.to_le_bytes()[..data.len()]);
    }
    fn write(&mut self, _offset: u64, data: &[u8]) {
        self.writes
            .push(u32::from_le_bytes(data.try_into().unwrap()));
    }
}

/// No interrupt table and an invalid instruction: a triple fault.
const CRASH: [u8; 2] = [0x0f, 0x0b];

/// Boots 32-bit code by multiboot, behind where the walking guest lies.
fn boot_code(vm: &mut Vm, code: &[u8]) {
    let words: [u32; 8] = [
        0x1bad_b002,
        0x10000,
        0u32.wrapping_sub(0x1bad_b002 + 0x10000),
        0x20_0000,
        0x20_0000,
        0,
        0,
        0x20_0020,
    ];
    let mut image: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    image.extend_from_slice(code);
    let boot = Boot {
        kernel: &image,
        initrd: None,
        cmdline: "",
    };
    vm.boot(&boot).unwrap();
}

#[test]
fn an_access_that_a_stop_interrupts_is_finished_once() {
    let Some(host) = host() else { return };
    // 1: in eax, dx; out dx, eax; then the same by MMIO; forever. What was read is written back.
    #[rustfmt::skip]
    let code = [
        0x66, 0xba, 0x00, 0x05,             // mov dx, 0x500
        0xed,                               // 1: in eax, dx
        0xef,                               // out dx, eax
        0xa1, 0x00, 0x00, 0x00, 0xd0,       // mov eax, [0xd0000000]
        0xa3, 0x00, 0x00, 0x00, 0xd0,       // mov [0xd0000000], eax
        0xeb, 0xf2,                         // jmp 1b
    ];
    let mut vm = Vm::new(&host, &VmConfig::default()).unwrap();
    let (port, mmio) = (
        Arc::new(Mutex::new(Counter::default())),
        Arc::new(Mutex::new(Counter::default())),
    );
    vm.map_ports(0x500, 4, port.clone()).unwrap();
    vm.map_mmio(0xd000_0000, 4, mmio.clone()).unwrap();
    boot_code(&mut vm, &code);
    let mut state = Vec::new();
    for _ in 0..500 {
        vm.resume().unwrap();
        vm.pause();
        // A restore of what was saved must not repeat or skip an access either.
        vm.save_state(&mut state).unwrap();
        vm.load_state(&state).unwrap();
    }
    for device in [port, mmio] {
        let device = device.lock().unwrap();
        let count = u32::try_from(device.writes.len()).unwrap();
        assert!(count > 10, "the guest came to {count} accesses");
        assert_eq!(device.writes, (1..=count).collect::<Vec<_>>());
    }
}

/// A pipe that is read no more.
struct Stuck(mpsc::Receiver<()>);

impl Write for Stuck {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ended = self.0.recv();
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_guest_is_stopped_while_nobody_reads_its_console() {
    let Some(host) = host() else { return };
    // mov dx, 0x3f8; 1: out dx, al; jmp 1b
    let code = [0x66, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xfd];
    let mut vm = Vm::new(&host, &VmConfig::default()).unwrap();
    let (_read, stuck) = mpsc::channel();
    let sink = Sink::queued(Stuck(stuck)).unwrap();
    let serial = Serial::new("serial0", Irq::new().unwrap(), sink);
    let serial = Arc::new(Mutex::new(serial));
    vm.map_ports(0x3f8, 8, serial.clone()).unwrap();
    boot_code(&mut vm, &code);
    vm.resume().unwrap();
    while serial.lock().unwrap().metrics().out < 1000 {
        std::thread::yield_now();
    }
    vm.pause();
    assert!(!vm.running());
}

#[test]
fn two_vcpus_are_one_machine() {
    are_one_machine(2, 50);
}

#[test]
fn one_to_eight_vcpus_are_one_machine() {
    for vcpus in [1, 3, 4, 5, 6, 7, 8] {
        are_one_machine(vcpus, 5);
    }
}

/// Each vCPU writes its own part of memory; copies of the machine go on where all of them were.
fn are_one_machine(vcpus: usize, rounds: usize) {
    let Some(host) = host() else { return };
    let config = VmConfig {
        vcpus,
        ..VmConfig::default()
    };
    let walk = Walk {
        cpus: vcpus as u64,
        ws: 300,
        ..Walk::default()
    };
    let mut vm = machine(&host, &config, walk);
    vm.start_tracking().unwrap();
    vm.resume().unwrap();
    let all = 0..vcpus as u64;
    for n in all.clone() {
        await_visits(&vm, n, 1000);
    }
    let mut copy = Vm::new(&host, &config).unwrap();
    copy.start_tracking().unwrap();
    let mut checkpoint = vm.checkpoint(40_000).unwrap();
    let mut theirs = PageSet::new(&vm.memory().shape());
    copy.harvest(&mut theirs).unwrap();
    theirs.clear();
    for round in 0..rounds {
        copy.harvest(&mut theirs).unwrap();
        let also = theirs.take_runs(u32::MAX, usize::MAX);
        vm.capture(&mut checkpoint, &also, true, Passes::Two, &mut || {})
            .unwrap();
        let runs = checkpoint.dirty.take_runs(u32::MAX, usize::MAX);
        copy.commit_ram(&checkpoint.staging, &runs).unwrap();
        copy.load_state(&checkpoint.state).unwrap();
        let at: Vec<u64> = all.clone().map(|n| visits(&copy, n)).collect();
        copy.resume().unwrap();
        for (n, at) in all.clone().zip(at) {
            await_visits(&copy, n, at);
        }
        copy.pause();
        assert_eq!(contradictions(&copy), [], "{vcpus} vCPUs, round {round}");
    }
    vm.pause();
    assert_eq!(contradictions(&vm), []);
}

/// A machine whose guest is crashing, and a state that does not.
fn crashing(host: &Host) -> (Vm, Vec<u8>) {
    let mut vm = machine(host, &VmConfig::default(), Walk::default());
    let mut good = Vec::new();
    vm.save_state(&mut good).unwrap();
    // No interrupt table and an invalid instruction: a triple fault.
    boot_code(&mut vm, &CRASH);
    vm.resume().unwrap();
    (vm, good)
}

#[test]
fn a_guest_that_crashes_says_so_and_can_be_brought_back() {
    let Some(host) = host() else { return };
    let (mut vm, good) = crashing(&host);
    let events = loop {
        let events = vm.take_events();
        if !events.is_empty() {
            break events;
        }
        std::thread::yield_now();
    };
    assert!(matches!(
        events[..],
        [VcpuEvent::Shutdown { vcpu: 0 } | VcpuEvent::Failed { vcpu: 0, .. }]
    ));
    // It can be stopped, and runs again from a good state.
    vm.load_state(&good).unwrap();
    vm.resume().unwrap();
    await_visits(&vm, 0, 1000);
}

#[test]
fn a_load_takes_back_what_the_replaced_guest_said() {
    let Some(host) = host() else { return };
    let (mut vm, good) = crashing(&host);
    let fd = vm.event_fd().as_raw_fd();
    // SAFETY: the descriptor is open for as long as the VM is.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], None).unwrap();
    vm.load_state(&good).unwrap();
    assert_eq!(vm.take_events(), []);
}
