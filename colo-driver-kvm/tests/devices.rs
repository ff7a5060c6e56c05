//! A guest with drivers of its own finds the devices, uses them, and takes them along in a checkpoint.

#![allow(clippy::unwrap_used, reason = "tests")]
mod common;

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use bytes::Bytes;
use colo_driver_kvm::boot::Boot;
use colo_driver_kvm::caps::Host;
use colo_driver_kvm::checkpoint::Passes;
use colo_driver_kvm::device::virtio::{Net, NetConfig, Offloads, RxOutcome, Virtio};
use colo_driver_kvm::device::{BusDevice, Irq, Serial, Sink};
use colo_driver_kvm::vm::{Transport, Vm, VmConfig};
use colo_proto::id::PageRuns;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0x15];
const GUEST: [u8; 4] = [10, 0, 2, 15];
const CLIENT: [u8; 4] = [10, 0, 2, 2];
const BOTH: [Transport; 2] = [Transport::Mmio, Transport::Pci];

/// A machine with the `server` guest in it, a console and a network card.
struct Machine {
    vm: Vm,
    net: Arc<Mutex<Virtio<Net>>>,
    console: mpsc::Receiver<Vec<u8>>,
    inputs: u64,
    sent: Vec<(u64, Bytes)>,
}

impl Machine {
    fn new(host: &Host, transport: Transport) -> Self {
        let mut vm = Vm::new(host, &VmConfig::default()).unwrap();
        let (out, console) = mpsc::channel();
        let sink = Sink::callback(move |bytes| out.send(bytes.to_vec()).unwrap());
        let irq = Irq::new().unwrap();
        vm.route_irq(&irq, 4).unwrap();
        let serial = Arc::new(Mutex::new(Serial::new("serial0", irq, sink)));
        vm.attach(serial.clone()).unwrap();
        vm.map_ports(0x3f8, 8, serial).unwrap();

        let config = NetConfig {
            mac: MAC,
            offloads: Offloads::default(),
        };
        let net = vm
            .attach_virtio(transport, "virtio-net0", Net::new(config))
            .unwrap();
        let boot = Boot {
            kernel: colo_guests::SERVER,
            initrd: None,
            cmdline: "ip=10.0.2.15/24 gw=10.0.2.2 quiet=1",
        };
        vm.boot(&boot).unwrap();
        Self {
            vm,
            net,
            console,
            inputs: 0,
            sent: vec![],
        }
    }

    /// Runs until the guest sends a frame for which `wanted` holds.
    fn await_frame(&mut self, wanted: impl Fn(&[u8]) -> bool) -> (u64, Bytes) {
        let wake = self.net.lock().unwrap().wake_fd().try_clone().unwrap();
        loop {
            while !self.sent.is_empty() {
                let (epoch, frame) = self.sent.remove(0);
                if wanted(&frame) {
                    return (epoch, frame);
                }
            }
            // SAFETY: `wake` stays open until the function returns.
            let fd = unsafe { BorrowedFd::borrow_raw(wake.as_raw_fd()) };
            let mut ready = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
            let patience = Timespec {
                tv_sec: 20,
                tv_nsec: 0,
            };
            let woken = poll(&mut ready, Some(&patience)).unwrap();
            let events = self.vm.take_events();
            assert!(woken > 0 && events.is_empty(), "{events:?}");
            let sent = &mut self.sent;
            self.net
                .lock()
                .unwrap()
                .poll_tx(64, &mut |epoch, frame| sent.push((epoch, frame)));
        }
    }

    /// Starts the guest and runs it until its console says that its card is up.
    fn start(&mut self) {
        self.vm.resume().unwrap();
        let mut printed = Vec::new();
        while !printed.ends_with(b"\n") {
            let more = self.console.recv_timeout(Duration::from_secs(20));
            printed.extend(more.unwrap());
        }
        let printed = String::from_utf8_lossy(&printed);
        assert!(printed.contains("server: ready ip=10.0.2.15"), "{printed}");
    }

    fn bring(&mut self, frame: &[u8]) -> RxOutcome {
        self.inputs += 1;
        self.net.lock().unwrap().rx(self.inputs, frame)
    }

    /// Asks for the guest's hardware address and waits for the answer.
    fn resolve(&mut self, from: u8) -> u64 {
        self.bring(&request(from));
        let (epoch, answer) = self.await_frame(is_answer(from));
        assert_eq!(answer[6..12], MAC);
        epoch
    }
}

/// An ARP request of a client whose address ends in `from`.
fn request(from: u8) -> Vec<u8> {
    let mac = [2, 0, 0, 0, 0, from];
    let mut frame = vec![0xff; 6];
    frame.extend(mac);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend([CLIENT[0], CLIENT[1], CLIENT[2], from]);
    frame.extend([0; 6]);
    frame.extend(GUEST);
    frame.resize(60, 0);
    frame
}

fn is_answer(to: u8) -> impl Fn(&[u8]) -> bool {
    move |frame| frame[12..14] == [8, 6] && frame[21] == 2 && frame[41] == to
}

#[test]
fn a_guest_finds_its_card_and_answers_on_either_transport() {
    let Some(host) = common::host() else { return };
    for transport in BOTH {
        let mut machine = Machine::new(&host, transport);
        machine.start();
        for from in 20..220 {
            machine.resolve(from);
        }
        machine.vm.pause();
        let net = machine.net.lock().unwrap();
        assert_eq!(net.consumed_inputs(), 200);
        assert_eq!(net.malformed(), 0);
    }
}

#[test]
fn inputs_of_a_stop_are_answered_after_it_under_the_next_epoch() {
    let Some(host) = common::host() else { return };
    for transport in BOTH {
        let mut machine = Machine::new(&host, transport);
        machine.start();
        machine.resolve(20);
        for epoch in 1..=50 {
            machine.vm.pause();
            let from = 20 + epoch as u8;
            assert_eq!(machine.bring(&request(from)), RxOutcome::Queued);
            machine.net.lock().unwrap().set_epoch(epoch);
            machine.vm.resume().unwrap();
            let (under, _) = machine.await_frame(is_answer(from));
            assert_eq!(under, epoch);
        }
    }
}

#[test]
fn the_copy_of_a_machine_answers_with_its_own_devices() {
    let Some(host) = common::host() else { return };
    for transport in BOTH {
        let mut one = Machine::new(&host, transport);
        let mut two = Machine::new(&host, transport);
        one.vm.start_tracking().unwrap();
        one.start();
        for from in 20..40 {
            one.resolve(from);
        }
        // A frame on its way in is in the ring or known to be missing: either way nobody gets it twice.
        one.bring(&request(40));
        let mut checkpoint = one.vm.checkpoint(65_536).unwrap();
        one.vm
            .capture(
                &mut checkpoint,
                &PageRuns::default(),
                true,
                Passes::Two,
                &mut || {},
            )
            .unwrap();
        while !checkpoint.dirty.is_empty() {
            let runs = checkpoint.dirty.take_runs(u32::MAX, usize::MAX);
            two.vm.commit_ram(&checkpoint.staging, &runs).unwrap();
        }
        two.vm.load_state(&checkpoint.state).unwrap();
        two.inputs = two.net.lock().unwrap().consumed_inputs();
        assert!((20..=21).contains(&two.inputs), "{}", two.inputs);
        two.vm.resume().unwrap();
        for machine in [&mut one, &mut two] {
            for from in 41..60 {
                machine.resolve(from);
            }
        }
    }
}

#[test]
fn a_machine_with_the_other_transport_refuses_the_state() {
    let Some(host) = common::host() else { return };
    let [mut one, two] = BOTH.map(|transport| Machine::new(&host, transport));
    let mut state = Vec::new();
    one.vm.save_state(&mut state).unwrap();
    let error = two.vm.check_state(&state).unwrap_err().to_string();
    assert!(error.contains("section pci is missing"), "{error}");
}

/// A machine with a card whose driver never runs: the test writes its registers.
fn with_card(host: &Host) -> (Vm, Arc<Mutex<Virtio<Net>>>) {
    let mut vm = common::machine(host, &VmConfig::default(), common::Walk::default());
    let net = Net::new(NetConfig {
        mac: MAC,
        offloads: Offloads::default(),
    });
    let ram = vm.memory().ram().clone();
    let card = Virtio::new("virtio-net0", net, ram, Irq::new().unwrap()).unwrap();
    let card = Arc::new(Mutex::new(card));
    vm.attach(card.clone()).unwrap();
    (vm, card)
}

/// What a takeover from standby and a restore do: the machine has not run when the state comes.
#[test]
fn what_was_on_its_way_at_the_cut_is_raised_by_a_machine_that_never_ran() {
    let Some(host) = common::host() else { return };
    let (mut one, card) = with_card(&host);
    one.resume().unwrap();
    // Status, features (version 1) and status again, as a driver brings its device up.
    for (register, value) in [
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x70, 11),
        (0x70, 15),
    ] {
        let value: u32 = value;
        card.lock().unwrap().write(register, &value.to_le_bytes());
    }
    assert!(card.lock().unwrap().has_driver());
    // An interrupt that nobody acknowledges.
    card.lock().unwrap().set_link(false);
    let mut state = Vec::new();
    one.save_state(&mut state).unwrap();

    for ran_before in [true, false] {
        let (mut two, card) = with_card(&host);
        if ran_before {
            two.resume().unwrap();
            two.pause();
        }
        two.load_state(&state).unwrap();
        let raised = || {
            card.lock()
                .unwrap()
                .interrupts()
                .line()
                .unwrap()
                .fd()
                .read()
                .is_ok()
        };
        let woken = || card.lock().unwrap().wake_fd().read().is_ok();
        assert!(!raised() && !woken(), "before the resume");
        two.resume().unwrap();
        assert!(raised(), "ran before: {ran_before}");
        assert!(woken(), "ran before: {ran_before}");
    }
}
