//! The function as a driver sees it: found by its capabilities, brought up through its BAR.

use std::sync::{Arc, Mutex};

use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::device::pci::test_utils::{messages, sent};
use crate::device::pci::{Function as _, Msix};
use crate::device::test_utils::{assert_refuses_damage, saved};
use crate::device::virtio::{Rng, Virtio};
use crate::device::{BusDevice as _, Persist as _};
use crate::memory::GuestRam;

const RAM: usize = 0x1_0000;
const RING: u64 = 0x1000;
const BUFFER: u64 = 0x8000;
const COMMON: u64 = 0;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;

/// An entropy source behind PCI, and the RAM it shares with its driver.
struct Machine {
    function: VirtioPci<Rng>,
    device: Arc<Mutex<Virtio<Rng>>>,
    messages: Msix,
    ram: GuestRam,
}

impl Machine {
    fn new() -> Self {
        let (messages, _) = messages(1);
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
        let device = Virtio::new("virtio-rng0", Rng::new(), ram.clone(), messages.clone()).unwrap();
        let device = Arc::new(Mutex::new(device));
        let mut function = VirtioPci::new("pci1", device.clone()).unwrap();
        function.place(0xe000_0000);
        Self {
            function,
            device,
            messages,
            ram,
        }
    }

    fn config(&mut self, at: usize) -> u32 {
        let mut data = [0xff; 4];
        self.function.read_config(at, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&mut self, offset: u64, data: &[u8]) {
        self.function.write(offset, data);
    }

    fn get<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0xff; N];
        self.function.read(offset, &mut data);
        data
    }

    /// Places of the capabilities, by id and kind.
    fn capabilities(&mut self) -> Vec<(u8, u8, usize)> {
        let mut at = self.config(0x34) as usize & 0xff;
        let mut all = Vec::new();
        while at != 0 {
            let [id, next, _, kind] = self.config(at).to_le_bytes();
            all.push((id, kind, at));
            at = next.into();
        }
        all
    }

    /// Message 1 for the ring, message 0 for the configuration.
    fn up(mut self) -> Self {
        let msix = self.capabilities().last().unwrap().2;
        self.function.write_config(4, &[6, 0]);
        self.function.write_config(msix + 2, &[1, 0x80]);
        for vector in 0..2 {
            self.set(TABLE + 16 * vector, &0xfee0_0000u32.to_le_bytes());
            self.set(TABLE + 16 * vector + 8, &[0x41, 0, 0, 0]);
            self.set(TABLE + 16 * vector + 12, &[0; 4]);
        }
        for status in [0, 1, 3] {
            self.set(COMMON + 0x14, &[status]);
        }
        self.set(COMMON + 0x08, &[1, 0, 0, 0]);
        self.set(COMMON + 0x0c, &[1, 0, 0, 0]);
        self.set(COMMON + 0x14, &[11]);
        self.set(COMMON + 0x10, &[0, 0]);
        self.set(COMMON + 0x16, &[0, 0]);
        self.set(COMMON + 0x18, &[8, 0]);
        self.set(COMMON + 0x1a, &[1, 0]);
        for (field, at) in [(0x20, RING), (0x28, RING + 0x100), (0x30, RING + 0x200)] {
            self.set(COMMON + field, &(at as u32).to_le_bytes());
        }
        self.set(COMMON + 0x1c, &[1, 0]);
        self.set(COMMON + 0x14, &[15]);
        assert_eq!(self.get(COMMON + 0x14), [15]);
        self
    }

    /// Asks for 16 bytes, for the `n`th time.
    fn post(&self, n: u16) {
        let put = |at: u64, bytes: &[u8]| self.ram.write_slice(bytes, GuestAddress(at)).unwrap();
        put(RING, &BUFFER.to_le_bytes());
        put(RING + 8, &[16, 0, 0, 0, 2, 0, 0, 0]);
        put(RING + 0x104 + 2 * u64::from((n - 1) % 8), &[0, 0]);
        put(RING + 0x102, &n.to_le_bytes());
    }

    fn completed(&self) -> u16 {
        self.ram.read_obj(GuestAddress(RING + 0x202)).unwrap()
    }
}

#[test]
fn the_function_says_what_it_is_and_where_its_parts_are() {
    let mut machine = Machine::new();
    assert_eq!(machine.config(0), 0x1044_1af4);
    assert_eq!(machine.config(8) >> 8, 0x00ff_0000);
    assert_eq!(machine.config(0x3c) >> 8, 0, "no interrupt pin");
    let all = machine.capabilities();
    let kinds: Vec<_> = all.iter().map(|&(id, kind, _)| (id, kind)).collect();
    assert_eq!(kinds[..5], [(9, 1), (9, 3), (9, 4), (9, 2), (9, 5)]);
    assert_eq!(all[5].0, 0x11);
    for &(_, _, at) in &all[..4] {
        let (offset, len) = (machine.config(at + 8), machine.config(at + 12));
        assert!(offset + len <= 0x8000 && offset % 4 == 0);
        assert_eq!(machine.config(at + 4), 0, "all in BAR 0");
    }
    assert_eq!(machine.config(all[5].2) >> 16, 1, "two messages");
}

#[test]
fn the_bar_answers_only_when_memory_is_enabled() {
    let mut machine = Machine::new();
    assert_eq!(machine.function.memory(), None);
    machine.function.write_config(4, &[2, 0]);
    assert_eq!(machine.function.memory(), Some(0xe000_0000..0xe000_8000));
    machine.function.write_config(0x10, &[0xff; 4]);
    assert_eq!(machine.config(0x10), 0xffff_8000);
    machine.function.write_config(0x10, &[0; 4]);
    assert_eq!(machine.function.memory(), None);
}

#[test]
fn a_request_is_served_and_its_rings_message_sent() {
    let mut machine = Machine::new().up();
    for n in 1..=20 {
        machine.post(n);
        machine.set(NOTIFY, &[0, 0]);
        assert_eq!(machine.completed(), n);
        assert!(sent(&machine.messages, 1));
        assert!(!sent(&machine.messages, 0));
    }
    assert_eq!(machine.get(0x1000), [1], "interrupt status");
    assert_eq!(machine.get(0x1000), [0], "read once");
}

#[test]
fn fields_take_their_own_width_only() {
    let mut machine = Machine::new().up();
    let before = (
        saved(&machine.function),
        saved(&*machine.device.lock().unwrap()),
    );
    for at in 0..0x38 {
        for len in [1, 2, 3, 4, 8] {
            let natural = match at {
                0x14 | 0x15 => 1,
                0x10..0x20 => 2,
                _ => 4,
            };
            if len != natural {
                machine.set(at, &vec![0x5a; len]);
            }
        }
    }
    assert_eq!(machine.get(0x14 - 2), [0xff; 4]);
    for offset in [0x38, 0x1001, 0x3004, 0x4400, 0x5008, 0x7fff, u64::MAX] {
        machine.set(offset, &[0]);
        assert_eq!(machine.get(offset), [0xff]);
    }
    let after = (
        saved(&machine.function),
        saved(&*machine.device.lock().unwrap()),
    );
    assert!(after == before);
}

#[test]
fn the_window_shows_the_bar() {
    let mut machine = Machine::new().up();
    let window = machine.capabilities()[4].2;
    let point = |machine: &mut Machine, offset: u32, len: u32| {
        machine
            .function
            .write_config(window + 8, &offset.to_le_bytes());
        machine
            .function
            .write_config(window + 12, &len.to_le_bytes());
    };
    point(&mut machine, 0x14, 1);
    assert_eq!(machine.config(window + 16) & 0xff, 15, "status");
    machine.function.write_config(window + 16, &[0]);
    assert_eq!(machine.get(COMMON + 0x14), [0], "reset through the window");
    for (offset, len) in [
        (0x14, 0),
        (0x14, 3),
        (0x15, 2),
        (0x8000, 4),
        (u32::MAX - 3, 4),
    ] {
        point(&mut machine, offset, len);
        machine.function.write_config(window + 16, &[1; 4]);
    }
    assert_eq!(machine.get(COMMON + 0x14), [0]);
}

#[test]
fn a_reset_takes_the_messages_back() {
    let mut machine = Machine::new().up();
    machine.set(COMMON + 0x14, &[0]);
    assert_eq!(machine.get(COMMON + 0x10), [0xff, 0xff]);
    assert_eq!(machine.get(COMMON + 0x1a), [0xff, 0xff]);
    machine.messages.raise_assigned();
    assert!(!sent(&machine.messages, 0) && !sent(&machine.messages, 1));
}

#[test]
fn a_checkpoint_carries_function_and_device_and_the_message_comes_again() {
    let mut one = Machine::new().up();
    one.post(1);
    one.set(NOTIFY, &[0, 0]);
    assert!(sent(&one.messages, 1), "and perhaps lost with the host");
    one.device.lock().unwrap().quiesce();
    let mut two = Machine::new();
    let mut ram = vec![0; RAM];
    one.ram.read_slice(&mut ram, GuestAddress(0)).unwrap();
    two.ram.write_slice(&ram, GuestAddress(0)).unwrap();
    let device = saved(&*one.device.lock().unwrap());
    let function = saved(&one.function);
    two.device.lock().unwrap().quiesce();
    two.device.lock().unwrap().load(1, &device).unwrap();
    two.function.load(1, &function).unwrap();
    assert!(!sent(&two.messages, 1), "before the resume");
    assert!(saved(&two.function) == function);
    for machine in [&one, &two] {
        machine.device.lock().unwrap().resume();
    }
    assert!(sent(&two.messages, 1) && sent(&two.messages, 0));
    assert!(!sent(&one.messages, 1), "here it was not lost");
    assert_eq!(two.function.memory(), one.function.memory());
    for machine in [&mut one, &mut two] {
        machine.post(2);
        machine.set(NOTIFY, &[0, 0]);
        assert_eq!(machine.completed(), 2);
        assert!(sent(&machine.messages, 1));
    }
}

#[test]
fn damage_is_refused_and_changes_nothing() {
    let one = Machine::new().up();
    let bytes = saved(&one.function);
    assert_refuses_damage(&mut Machine::new().function, &bytes);
}

#[test]
fn a_device_with_a_line_is_no_function() {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
    let line = crate::device::Irq::new().unwrap();
    let device = Virtio::new("virtio-rng0", Rng::new(), ram, line).unwrap();
    assert!(VirtioPci::new("pci1", Arc::new(Mutex::new(device))).is_none());
}
