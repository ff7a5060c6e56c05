//! The guests without a network card boot in our own VMM as they do in QEMU. (The `server` guest
//! is booted by the tests of `colo-driver-kvm`.)
#![expect(clippy::unwrap_used, reason = "a test's own set-up may fail the test")]

use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use colo_driver_kvm::boot::Boot;
use colo_driver_kvm::caps::Host;
use colo_driver_kvm::device::virtio::{Block, Disk, Mmio};
use colo_driver_kvm::device::{Irq, Serial, Sink};
use colo_driver_kvm::vm::{Vm, VmConfig};

#[test]
fn dirty_writes_and_verifies() {
    let Some(mut vm) = machine() else { return };
    let console = start(&mut vm, colo_guests::DIRTY, "pages=64 ws=1024");
    let line = line_with(&console, "dirty: t=2 ");
    assert!(line.ends_with("errors=0"), "{line}");
}

/// Without its multiboot header the same image is entered through its PVH note.
#[test]
fn dirty_boots_through_pvh_too() {
    let Some(mut vm) = machine() else { return };
    let mut image = colo_guests::DIRTY.to_vec();
    let magic = 0x1BAD_B002_u32.to_le_bytes();
    let at = image[..8192].windows(4).position(|w| w == magic).unwrap();
    image[at..at + 4].fill(0);
    let console = start(&mut vm, &image, "pages=64 ws=1024");
    let line = line_with(&console, "dirty: t=2 ");
    assert!(line.ends_with("errors=0"), "{line}");
}

#[test]
fn disk_writes_and_verifies() {
    let Some(mut vm) = machine() else { return };
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let disk = Arc::new(Disk::open(image.path(), false).unwrap());
    let irq = Irq::new().unwrap();
    let ram = vm.memory().ram().clone();
    let block = Mmio::new("virtio-blk0", Block::new(disk, "disk"), ram, irq.clone()).unwrap();
    vm.attach_mmio(Arc::new(Mutex::new(block)), &irq).unwrap();
    let console = start(&mut vm, colo_guests::DISK, "blocks=200");
    let line = line_with(&console, "disk: t=2 ");
    assert!(line.ends_with("errors=0"), "{line}");
}

/// A machine without devices; none if this host cannot.
fn machine() -> Option<Vm> {
    match Host::open() {
        Ok(host) => Some(Vm::new(&host, &VmConfig::default()).unwrap()),
        Err(why) => {
            let required = std::env::var("COLO_REQUIRE").unwrap_or_default();
            assert!(
                !required.split(',').any(|name| name == "kvm"),
                "kvm is required: {why}"
            );
            println!("SKIPPED: {why}");
            None
        }
    }
}

/// Adds a console, boots, and returns what the console says.
fn start(vm: &mut Vm, kernel: &[u8], cmdline: &str) -> Receiver<Vec<u8>> {
    let (out, console) = mpsc::channel();
    // The test may have seen enough before the guest stops talking.
    let sink = Sink::callback(move |bytes| drop(out.send(bytes.to_vec())));
    let irq = Irq::new().unwrap();
    vm.route_irq(&irq, 4).unwrap();
    let serial = Arc::new(Mutex::new(Serial::new("serial0", irq, sink)));
    vm.attach(serial.clone()).unwrap();
    vm.map_ports(0x3f8, 8, serial).unwrap();
    vm.boot(&Boot {
        kernel,
        initrd: None,
        cmdline,
    })
    .unwrap();
    vm.resume().unwrap();
    console
}

fn line_with(console: &Receiver<Vec<u8>>, text: &str) -> String {
    let mut printed = Vec::new();
    loop {
        // A guest that hangs fails the test instead of blocking it.
        match console.recv_timeout(Duration::from_secs(60)) {
            Ok(bytes) => printed.extend(bytes),
            Err(why) => panic!("{why} after {:?}", String::from_utf8_lossy(&printed)),
        }
        let all = String::from_utf8_lossy(&printed).into_owned();
        let line = all.split_inclusive("\r\n").find(|line| line.contains(text));
        if let Some(line) = line.and_then(|line| line.strip_suffix("\r\n")) {
            return line.to_owned();
        }
    }
}
