//! Every way a page can change is found by the next harvest, once.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use colo_driver_kvm::caps::Host;
use colo_driver_kvm::checkpoint::{CaptureError, Passes};
use colo_driver_kvm::dirty::{DirtyMode, OwnLog};
use colo_driver_kvm::memory::{PageStore, StagingError};
use colo_driver_kvm::vm::{Vm, VmConfig};
use colo_proto::id::{PageRuns, Slot};
use colo_proto::ram::PageSet;
use common::{Walk, await_visits, contradictions, host, machine, visits};
use vm_memory::bitmap::{Bitmap, NewBitmap};
use vm_memory::{Bytes, GuestAddress};

fn modes() -> [VmConfig; 2] {
    [DirtyMode::Bitmap, DirtyMode::Ring(65_536)].map(|dirty| VmConfig {
        dirty,
        ..VmConfig::default()
    })
}

fn pages(set: &PageSet) -> Vec<(u16, u64)> {
    let runs = set.clone().take_runs(u32::MAX, usize::MAX);
    runs.iter()
        .flat_map(|r| (r.first..r.end()).map(|p| (r.slot.0, p)))
        .collect()
}

fn harvest(vm: &mut Vm) -> PageSet {
    let mut set = PageSet::new(&vm.memory().shape());
    vm.harvest(&mut set).unwrap();
    set
}

#[test]
fn at_the_start_of_tracking_everything_is_dirty_once() {
    let Some(host) = host() else { return };
    for config in modes() {
        let mut vm = Vm::new(&host, &config).unwrap();
        vm.start_tracking().unwrap();
        assert_eq!(harvest(&mut vm).count(), (128 << 20) / 4096);
        assert_eq!(harvest(&mut vm).count(), 0);
        vm.stop_tracking().unwrap();
        vm.start_tracking().unwrap();
        assert_eq!(harvest(&mut vm).count(), (128 << 20) / 4096);
        assert_eq!(harvest(&mut vm).count(), 0);
    }
}

#[test]
fn what_the_guest_writes_is_found_and_only_that() {
    let Some(host) = host() else { return };
    for config in modes() {
        let walk = Walk {
            ws: 100,
            ..Walk::default()
        };
        let mut vm = machine(&host, &config, walk);
        vm.resume().unwrap();
        await_visits(&vm, 0, 1000);
        vm.pause();
        vm.start_tracking().unwrap();
        harvest(&mut vm);
        vm.resume().unwrap();
        let before = visits(&vm, 0);
        await_visits(&vm, 0, before + 1000);
        vm.pause();
        let mut expect = vec![(0, 1)];
        expect.extend((1024..1124).map(|p| (0, p)));
        assert_eq!(pages(&harvest(&mut vm)), expect);
        assert_eq!(harvest(&mut vm).count(), 0, "once");
    }
}

#[test]
fn what_a_device_writes_is_found_beside_the_guest() {
    let Some(host) = host() else { return };
    for config in modes() {
        let mut vm = Vm::new(&host, &config).unwrap();
        vm.start_tracking().unwrap();
        harvest(&mut vm);
        let ram = vm.memory().ram().clone();
        ram.write_slice(&[1; 2], GuestAddress(5 * 4096 - 1))
            .unwrap();
        assert_eq!(pages(&harvest(&mut vm)), [(0, 4), (0, 5)]);
    }
}

#[test]
fn what_kvm_itself_writes_is_found() {
    let Some(host) = host() else { return };
    let mut vm = Vm::new(&host, &VmConfig::default()).unwrap();
    let mut state = Vec::new();
    vm.save_state(&mut state).unwrap();
    vm.start_tracking().unwrap();
    harvest(&mut vm);
    vm.load_state(&state).unwrap();
    assert_eq!(harvest(&mut vm).count(), 0, "a load alone writes nothing");
}

/// A disk in memory.
struct Plate {
    bytes: Mutex<Vec<u8>>,
    log: OwnLog,
}

impl Plate {
    fn new(pages: usize) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(vec![0; pages * 4096]),
            log: OwnLog::with_len(pages * 4096),
        })
    }

    fn range(first: u64, len: usize) -> std::ops::Range<usize> {
        let at = usize::try_from(first).unwrap() * 4096;
        at..at + len
    }
}

impl PageStore for Plate {
    fn pages(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64 / 4096
    }
    fn take_dirty(&self, into: &mut [u64]) {
        self.log.take(into);
    }
    fn read_pages(&self, first: u64, into: &mut [u8]) -> io::Result<()> {
        into.copy_from_slice(&self.bytes.lock().unwrap()[Self::range(first, into.len())]);
        Ok(())
    }
    fn write_pages(&self, first: u64, from: &[u8]) -> io::Result<()> {
        self.bytes.lock().unwrap()[Self::range(first, from.len())].copy_from_slice(from);
        Ok(())
    }
}

#[test]
fn a_disk_is_a_slot_like_any_other() {
    let Some(host) = host() else { return };
    let disk = Plate::new(64);
    let mut vm = Vm::new(&host, &VmConfig::default()).unwrap();
    vm.attach_store(Slot(16), disk.clone()).unwrap();
    vm.start_tracking().unwrap();
    assert_eq!(harvest(&mut vm).count(), 32_768 + 64);

    disk.write_pages(3, &[7; 4096]).unwrap();
    disk.log.mark_dirty(3 * 4096, 4096);
    let mut checkpoint = vm.checkpoint(1000).unwrap();
    vm.capture(
        &mut checkpoint,
        &PageRuns::new(),
        false,
        Passes::One,
        &mut || {},
    )
    .unwrap();
    assert_eq!(pages(&checkpoint.dirty), [(16, 3)]);

    // The content goes into another machine's disk, and counts as nobody's write there.
    let other = Plate::new(64);
    let mut copy = Vm::new(&host, &VmConfig::default()).unwrap();
    copy.attach_store(Slot(16), other.clone()).unwrap();
    copy.start_tracking().unwrap();
    harvest(&mut copy);
    let runs = checkpoint.dirty.take_runs(u32::MAX, usize::MAX);
    copy.commit_ram(&checkpoint.staging, &runs).unwrap();
    copy.load_state(&checkpoint.state).unwrap();
    assert_eq!(*other.bytes.lock().unwrap(), *disk.bytes.lock().unwrap());
    assert_eq!(harvest(&mut copy).count(), 0);

    // A snapshot has it too.
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("vm.snap");
    vm.save(&file).unwrap();
    other.write_pages(9, &[1; 4096]).unwrap();
    copy.restore(&file).unwrap();
    assert_eq!(*other.bytes.lock().unwrap(), *disk.bytes.lock().unwrap());
}

#[test]
fn a_capture_over_the_bound_loses_nothing_and_the_guest_runs_on() {
    let Some(host) = host() else { return };
    for config in modes() {
        let walk = Walk {
            ws: 200,
            ..Walk::default()
        };
        let mut vm = machine(&host, &config, walk);
        vm.start_tracking().unwrap();
        harvest(&mut vm);
        vm.resume().unwrap();
        await_visits(&vm, 0, 1000);
        let mut small = vm.checkpoint(50).unwrap();
        for passes in [Passes::Two, Passes::One] {
            let error = vm
                .capture(&mut small, &PageRuns::new(), true, passes, &mut || {})
                .unwrap_err();
            assert!(matches!(
                error,
                CaptureError::Staging(StagingError::Full { limit: 50, .. })
            ));
            assert!(vm.running());
        }
        // Without a copy it needs no room, and everything is still dirty.
        vm.capture(
            &mut small,
            &PageRuns::new(),
            false,
            Passes::None,
            &mut || {},
        )
        .unwrap();
        let found = pages(&small.dirty);
        assert!((1024..1224).all(|p| found.contains(&(0, p))));
        vm.resume().unwrap();
        let count = visits(&vm, 0);
        await_visits(&vm, 0, count + 1000);
        assert_eq!(contradictions(&vm), []);
    }
}

/// Six times as many pages as the ring of [`crowded`] has entries.
const CROWD: Walk = Walk {
    pages: 64,
    ws: 6144,
    period: 0,
    cpus: 1,
    base: 4 << 20,
};

fn crowded(host: &Host) -> Vm {
    let config = VmConfig {
        dirty: DirtyMode::Ring(1024),
        ..VmConfig::default()
    };
    machine(host, &config, CROWD)
}

#[test]
fn a_ring_that_fills_up_while_nobody_harvests_loses_nothing() {
    let Some(host) = host() else { return };
    let mut vm = crowded(&host);
    vm.resume().unwrap();
    await_visits(&vm, 0, CROWD.ws);
    vm.start_tracking().unwrap();
    harvest(&mut vm);
    let before = visits(&vm, 0);
    await_visits(&vm, 0, before + 2 * CROWD.ws);
    vm.pause();
    let found = pages(&harvest(&mut vm));
    let missing = (1024..1024 + CROWD.ws).filter(|p| found.binary_search(&(0, *p)).is_err());
    assert_eq!(missing.count(), 0);
}

#[test]
fn a_ring_that_fills_while_the_owner_collects_is_no_overflow() {
    let Some(host) = host() else { return };
    let mut vm = crowded(&host);
    vm.resume().unwrap();
    // Past ring 0, which really overflows the ring where KVM emulates it.
    await_visits(&vm, 0, 1);
    vm.start_tracking().unwrap();
    let mut set = PageSet::new(&vm.memory().shape());
    let begin = Instant::now();
    let mut rounds = 0;
    while begin.elapsed() < Duration::from_millis(1500) {
        // KVM stops the vCPU when less than half of the ring is used: some rounds meet that.
        rounds += 1;
        let near = visits(&vm, 0) + 256;
        let round = Instant::now();
        while visits(&vm, 0) < near && round.elapsed() < Duration::from_millis(100) {}
        for _ in 0..rounds % 50 * 100 {
            std::hint::spin_loop();
        }
        vm.harvest(&mut set).unwrap();
        assert_eq!(vm.take_events(), [], "round {rounds}");
    }
    vm.pause();
    assert_eq!(contradictions(&vm), []);
}
