//! The standby knows no device, so it takes them all: sections are bounded by the description and
//! by footers, whatever is in them.

use colod::qemu::standby::{Event, Outcome};

use crate::{
    for_each_version,
    side::Side,
    standby::goes_on,
    versions::Qemu,
    vm::{Machine, Vm, arguments},
};

const CHECKPOINTS: u64 = 15;

fn protects(qemu: Qemu, devices: &[&str]) {
    if !qemu.can_run() {
        return;
    }
    let machine = Machine::dirty(qemu, 64).with(devices);
    let stream = machine.path("vm.stream");
    let (listener, command) = machine.resume_command("-S");
    let side = Side::start(arguments([
        "--listen",
        "127.0.0.1:0",
        "--out",
        stream.to_str().unwrap(),
        "--resume-with",
        &command,
    ]));
    let mut primary = machine.start(&[]);
    primary.wait_until(|c| c.is_ready());
    primary.protect(&side.uri, 10);
    loop {
        match side.next() {
            Event::Whole { epoch, .. } if epoch >= CHECKPOINTS => break,
            Event::Whole { .. } | Event::Connected | Event::Protected { .. } => {}
            other => panic!("{devices:?}: {other:?}"),
        }
    }
    primary.kill();
    goes_on(Vm::attach(&listener), &stream);
    assert!(matches!(side.join(), Outcome::Resumed(_, Some(s)) if s.success()));
}

fn virtio_devices_on_pci(qemu: Qemu) {
    protects(
        qemu,
        &[
            "-device",
            "virtio-net-pci",
            "-device",
            "virtio-scsi-pci",
            "-device",
            "virtio-rng-pci",
            "-device",
            "virtio-serial-pci",
            "-device",
            "virtio-balloon-pci",
        ],
    );
}

/// Both send a section `slirp`, instance 0, under ids of their own.
fn two_user_networks_whose_sections_share_a_name(qemu: Qemu) {
    protects(
        qemu,
        &[
            "-netdev",
            "user,id=a",
            "-device",
            "rtl8139,netdev=a",
            "-netdev",
            "user,id=b",
            "-device",
            "e1000,netdev=b",
        ],
    );
}

fn a_screen_and_usb(qemu: Qemu) {
    protects(
        qemu,
        &[
            "-vga",
            "std",
            "-device",
            "qemu-xhci",
            "-device",
            "usb-tablet",
        ],
    );
}

fn two_processors(qemu: Qemu) {
    protects(qemu, &["-smp", "2"]);
}

/// QEMU's own secondary aborts on this machine (spec qemu B6).
fn the_q35_machine(qemu: Qemu) {
    protects(qemu, &["-machine", "q35"]);
}

fn the_microvm_machine_with_virtio_mmio(qemu: Qemu) {
    protects(
        qemu,
        &[
            "-machine",
            "microvm",
            "-netdev",
            "user,id=n",
            "-device",
            "virtio-net-device,netdev=n",
        ],
    );
}

for_each_version!(
    virtio_devices_on_pci,
    two_user_networks_whose_sections_share_a_name,
    a_screen_and_usb,
    two_processors,
    the_q35_machine,
    the_microvm_machine_with_virtio_mmio,
);
