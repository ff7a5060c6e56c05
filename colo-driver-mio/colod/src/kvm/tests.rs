//! The machine on a loop of its own. Without `/dev/kvm` they print why they are skipped.

use std::{
    fs,
    path::Path,
    sync::{
        Mutex,
        mpsc::{Receiver, channel},
    },
    time::{Duration, Instant},
};

use crate::config::{Config, Purpose};
use colo_driver_kvm::device::{
    BusDevice as _,
    virtio::{Backend, Virtio},
};
use colo_driver_mio::{
    Guest as _, Wake,
    guest::{Happened, Ready, Tokens},
};
use colo_proto::machine::{GuestDone, GuestOp};
use mio::{Events, Poll, Token};

use super::{Ended, KvmGuest, build, build::Served, guest, worker::lock};

const PATIENCE: Duration = Duration::from_secs(10);
const EACH: Duration = Duration::from_millis(5);
const LOAD: u32 = 0x10_0000;

/// Whether the tests can run here; says why not, and panics where they must.
fn kvm() -> bool {
    let Err(error) = colo_driver_kvm::caps::Host::open() else {
        return true;
    };
    let required = std::env::var("COLO_REQUIRE").unwrap_or_default();
    assert!(!required.split(',').any(|what| what == "kvm"), "{error}");
    println!("SKIPPED: {error}");
    false
}

/// A multiboot kernel that runs `code` and carries `data` one page after itself.
fn kernel(code: &[u8], data: &[u8]) -> Vec<u8> {
    let magic = 0x1bad_b002_u32;
    let (flags, entry) = (0x10000, LOAD + 32);
    let sum = 0_u32.wrapping_sub(magic + flags);
    let words = [magic, flags, sum, LOAD, LOAD, 0, 0, entry];
    let mut image: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    image.extend(code);
    image.resize(4096, 0);
    image.extend(data);
    image
}

/// A guest on a loop of its own.
struct Alone {
    guest: KvmGuest,
    poll: Poll,
    served: Served,
    ended: Receiver<Option<Ended>>,
}

impl Alone {
    fn start(dir: &Path, kernel: &[u8], more: &str) -> Self {
        fs::write(dir.join("kernel"), kernel).unwrap();
        fs::write(
            dir.join("vm.toml"),
            format!("[vm]\nkernel = \"kernel\"\nmemory = \"16M\"\n{more}"),
        )
        .unwrap();
        let config = Config::load(&dir.join("vm.toml"), Purpose::Run).unwrap();
        let built = build(&config).unwrap();
        let served = built.served.clone();
        let (end, ended) = channel();
        let (guest, _orders) = guest(&config, built, move |e| end.send(e).unwrap()).unwrap();
        let poll = Poll::new().unwrap();
        let mut alone = Self {
            guest,
            poll,
            served,
            ended,
        };
        let wake = Wake::new(alone.poll.registry(), Token(0)).unwrap();
        let registry = alone.poll.registry();
        alone.guest.attach(registry, Tokens::GUEST, wake).unwrap();
        alone.guest.start(GuestOp::Resume);
        alone.turn_until(|happened, _| {
            happened
                .iter()
                .any(|h| matches!(h, Happened::Done(GuestDone::Resumed)))
        });
        alone
    }

    /// Turns the loop until `done`, asked after each turn with what happened in it.
    fn turn_until(&mut self, mut done: impl FnMut(&[Happened], &Self) -> bool) {
        let mut events = Events::with_capacity(8);
        let until = Instant::now() + PATIENCE;
        loop {
            let happened: Vec<_> = std::iter::from_fn(|| self.guest.poll()).collect();
            if done(&happened, self) {
                return;
            }
            // What the machine's own thread does, it does without telling the loop.
            self.poll.poll(&mut events, Some(EACH)).unwrap();
            assert!(Instant::now() < until, "nothing happens any more");
            for event in &events {
                if let Some(index) = Tokens::GUEST.index(event.token()) {
                    let ready = Ready {
                        readable: true,
                        writable: false,
                    };
                    self.guest.ready(index, ready);
                }
            }
        }
    }
}

/// Brings a device up on the ring at `ring`, in which a request waits: the driver is ready
/// before its ring is, so the request is not seen at once. Then the device says that it has
/// seen it too late to serve it where it was notified.
fn leave_a_request<D: Backend>(device: &Mutex<Virtio<D>>, ring: u32) {
    let mut device = lock(device);
    let registers = [
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x70, 11),
        (0x70, 15),
        (0x38, 16),
        (0x80, ring),
        (0x90, ring + 0x100),
        (0xa0, ring + 0x200),
        (0x44, 1),
    ];
    for (register, value) in registers {
        device.write(register, &u32::to_le_bytes(value));
    }
    assert!(device.has_driver());
    device.wake_fd().write(1).unwrap();
}

/// Whether the guest was interrupted for a request.
fn completed<D: Backend>(device: &Mutex<Virtio<D>>) -> bool {
    let mut status = [0; 4];
    lock(device).read(0x60, &mut status);
    status[0] & 1 != 0
}

#[test]
fn a_request_that_came_too_late_for_its_notification_is_served_without_another() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("disk.img"), [0; 4096]).unwrap();
    // Two rings of 16: a descriptor of 8 bytes to write, and its number in the available ring.
    let mut rings = vec![0; 0x1000];
    for ring in [0, 0x800] {
        rings[ring..ring + 4].copy_from_slice(&(LOAD + 0x3000).to_le_bytes());
        rings[ring + 8] = 8;
        rings[ring + 12] = 2;
        rings[ring + 0x102] = 1;
    }
    let halt = [0xf4, 0xeb, 0xfd];
    let disk = "[disk]\npath = \"disk.img\"\n";
    let mut alone = Alone::start(dir.path(), &kernel(&halt, &rings), disk);
    leave_a_request(&alone.served.entropy, LOAD + 0x1000);
    alone.turn_until(|_, alone| completed(&alone.served.entropy));
    leave_a_request(alone.served.disk.as_ref().unwrap(), LOAD + 0x1800);
    alone.turn_until(|_, alone| completed(alone.served.disk.as_ref().unwrap()));
}

/// mov al, 0xfe; out 0x64, al; 1: jmp 1b
const RESET: [u8; 6] = [0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe];
/// mov dx, 0x604; mov ax, 0x3400; out dx, ax; 1: jmp 1b
const SWITCH_OFF: [u8; 12] = [
    0x66, 0xba, 4, 6, 0x66, 0xb8, 0, 0x34, 0x66, 0xef, 0xeb, 0xfe,
];

#[test]
fn a_reset_ends_the_vm_where_the_configuration_says_so() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut alone = Alone::start(dir.path(), &kernel(&RESET, &[]), "on_reboot = \"end\"\n");
    alone.turn_until(|_, alone| alone.ended.try_recv() == Ok(Some(Ended::Reset)));
}

#[test]
fn a_reset_boots_the_guest_again_and_a_power_off_ends_it() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // Memory outlives a reset: inc dword [0x300000]; cmp dword [0x300000], 3; jae off
    let count = [0xff, 0x05, 0, 0, 0x30, 0];
    let third = [0x83, 0x3d, 0, 0, 0x30, 0, 3, 0x73, 6];
    let code = [&count[..], &third, &RESET, &SWITCH_OFF].concat();
    let mut alone = Alone::start(dir.path(), &kernel(&code, &[]), "");
    alone.turn_until(|_, alone| alone.ended.try_recv() == Ok(Some(Ended::PowerOff)));
}

#[test]
fn a_guest_whose_processor_gives_up_crashed() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // int3, with no interrupt table.
    let mut alone = Alone::start(dir.path(), &kernel(&[0xcc], &[]), "on_crash = \"end\"\n");
    // KVM without hardware calls it an internal error.
    alone.turn_until(|_, alone| {
        let ended = alone.ended.try_recv();
        matches!(ended, Ok(Some(Ended::Crashed | Ended::Failed(_))))
    });
}
