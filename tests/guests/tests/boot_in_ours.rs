//! The guests without a network card boot in our own VMM as they do in QEMU. (The `server` guest
//! is booted by the tests of `colo-driver-kvm`.)
#![expect(clippy::unwrap_used, reason = "a test's own set-up may fail the test")]

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use colo_driver_kvm::boot::{Boot, KernelKind};
use colo_driver_kvm::caps::Host;
use colo_driver_kvm::device::virtio::{Block, Disk, Virtio};
use colo_driver_kvm::device::{Irq, Serial, Sink};
use colo_driver_kvm::vm::{Transport, Vm, VmConfig};
use rustix::event::{PollFd, PollFlags, poll};

#[test]
fn dirty_writes_and_verifies() {
    let Some(mut vm) = machine() else { return };
    let console = start(&mut vm, colo_guests::DIRTY, "pages=64 ws=1024");
    let line = line_with(&console, "dirty: t=2 ");
    assert!(line.ends_with("errors=0"), "{line}");
}

/// The same guest as each kind of kernel finds its command line and its ramdisk.
#[test]
fn every_kind_of_kernel_boots() {
    for kind in [KernelKind::Multiboot, KernelKind::Pvh, KernelKind::BzImage] {
        let Some(mut vm) = machine() else { return };
        let image = match kind {
            KernelKind::Multiboot => colo_guests::DIRTY.to_vec(),
            // Its note is what is left then.
            KernelKind::Pvh => colo_guests::without_multiboot(colo_guests::DIRTY),
            KernelKind::BzImage => colo_guests::bzimage(colo_guests::DIRTY),
        };
        let console = start_with(&mut vm, &image, Some(&[3; 1000]), "pages=64 ws=1024", kind);
        let all = lines_to(&console, "dirty: t=2 ");
        let seen = |text: &str| all.iter().any(|line| line.contains(text));
        assert!(seen("guest: ramdisk of 1000 bytes, sum 3000"), "{all:?}");
        assert!(seen("dirty: ready pages=64"), "{all:?}");
        assert!(all.last().unwrap().ends_with("errors=0"), "{all:?}");
    }
}

#[test]
fn disk_writes_and_verifies() {
    for (transport, name) in [
        (Transport::Mmio, "virtio-mmio@"),
        (Transport::Pci, "virtio-pci@"),
    ] {
        let Some(mut vm) = machine() else { return };
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let disk = Arc::new(Disk::open(image.path(), false).unwrap());
        let device = vm
            .attach_virtio(transport, "virtio-blk0", Block::new(disk, "disk"))
            .unwrap();
        serve_when_woken(device);
        let console = start(&mut vm, colo_guests::DISK, "blocks=200");
        let line = line_with(&console, "disk: ready ");
        assert!(line.contains(name), "{line}");
        let line = line_with(&console, "disk: t=2 ");
        assert!(line.ends_with("errors=0"), "{line}");
    }
}

/// Requests behind a flush are served when the flush is done, which only the device's event says.
fn serve_when_woken(device: Arc<Mutex<Virtio<Block>>>) {
    let woken = device.lock().unwrap().wake_fd().try_clone().unwrap();
    // It ends with the test's process.
    thread::spawn(move || {
        loop {
            // SAFETY: `woken` is open as long as this borrow is used.
            let fd = unsafe { BorrowedFd::borrow_raw(woken.as_raw_fd()) };
            poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], None).unwrap();
            device.lock().unwrap().serve();
        }
    });
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
    start_with(vm, kernel, None, cmdline, KernelKind::Multiboot)
}

fn start_with(
    vm: &mut Vm,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: &str,
    kind: KernelKind,
) -> Receiver<Vec<u8>> {
    let (out, console) = mpsc::channel();
    // The test may have seen enough before the guest stops talking.
    let sink = Sink::callback(move |bytes| drop(out.send(bytes.to_vec())));
    let irq = Irq::new().unwrap();
    vm.route_irq(&irq, 4).unwrap();
    let serial = Arc::new(Mutex::new(Serial::new("serial0", irq, sink)));
    vm.attach(serial.clone()).unwrap();
    vm.map_ports(0x3f8, 8, serial).unwrap();
    let boot = Boot {
        kernel,
        initrd,
        cmdline,
    };
    assert_eq!(vm.boot(&boot).unwrap(), kind);
    vm.resume().unwrap();
    console
}

fn line_with(console: &Receiver<Vec<u8>>, text: &str) -> String {
    lines_to(console, text).pop().unwrap()
}

/// All lines up to the one that contains `text`.
fn lines_to(console: &Receiver<Vec<u8>>, text: &str) -> Vec<String> {
    let mut printed = Vec::new();
    loop {
        // A guest that hangs fails the test instead of blocking it.
        match console.recv_timeout(Duration::from_secs(60)) {
            Ok(bytes) => printed.extend(bytes),
            Err(why) => panic!("{why} after {:?}", String::from_utf8_lossy(&printed)),
        }
        let all = String::from_utf8_lossy(&printed);
        let whole = all.rsplit_once("\r\n").map_or("", |(whole, _)| whole);
        let lines: Vec<String> = whole.split("\r\n").map(str::to_owned).collect();
        if let Some(at) = lines.iter().position(|line| line.contains(text)) {
            return lines[..=at].to_vec();
        }
    }
}
