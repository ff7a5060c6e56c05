//! The bridge: configuration accesses on both ways, BARs that move.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use super::registers::{BAR0, COMMAND, COMMAND_MEMORY, Identity, Registers};
use super::*;
use crate::device::test_utils::{assert_refuses_damage, saved};
use crate::device::{Bus, BusDevice, LoadError, Persist};

const LEN: u64 = 0x1000;

/// A function whose BAR reads as its number.
struct Plain(u8, Registers);

impl Plain {
    fn new(number: u8) -> Self {
        let mut registers = Registers::new(Identity {
            vendor: 0x1234,
            device: number.into(),
            class: [0xff, 0, 0],
            subsystem: 0,
        });
        registers.memory_bar(0, LEN as u32);
        Self(number, registers)
    }
}

impl BusDevice for Plain {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(self.0);
    }
    fn write(&mut self, _: u64, _: &[u8]) {}
}

impl Persist for Plain {
    fn section(&self) -> &str {
        "plain"
    }
    fn version(&self) -> u16 {
        1
    }
    fn quiesce(&mut self) {}
    fn save(&self, _: &mut Vec<u8>) {}
    fn check(&self, _: u16, _: &[u8]) -> Result<(), LoadError> {
        Ok(())
    }
    fn load(&mut self, _: u16, _: &[u8]) -> Result<(), LoadError> {
        Ok(())
    }
    fn resume(&mut self) {}
}

impl Function for Plain {
    fn read_config(&mut self, at: usize, data: &mut [u8]) {
        self.1.read(at, data);
    }
    fn write_config(&mut self, at: usize, data: &[u8]) {
        self.1.write(at, data);
    }
    fn place(&mut self, base: u64) {
        self.1.write(BAR0, &(base as u32).to_le_bytes());
    }
    fn bar_len(&self) -> u64 {
        LEN
    }
    fn memory(&self) -> Option<Range<u64>> {
        let base = u64::from(self.1.word(BAR0));
        (self.1.half(COMMAND) & COMMAND_MEMORY != 0).then(|| base..base + LEN)
    }
}

/// Where doorbells ring now.
#[derive(Debug, Default)]
struct Heard(Mutex<Vec<u64>>);

impl Doorbells for Heard {
    fn ring_at(&self, _: &EventFd, addr: u64) {
        self.0.lock().unwrap().push(addr);
    }
    fn silence(&self, _: &EventFd, addr: u64) {
        self.0.lock().unwrap().retain(|&at| at != addr);
    }
}

struct Machine {
    bus: Arc<Bus>,
    heard: Arc<Heard>,
    root: Arc<Mutex<PciRoot>>,
    ecam: Ecam,
    ports: ConfigPorts,
}

fn machine(functions: u8) -> Machine {
    let (bus, heard) = (Arc::new(Bus::new()), Arc::new(Heard::default()));
    let root = Arc::new(Mutex::new(PciRoot::new(bus.clone(), heard.clone())));
    for number in 1..=functions {
        let doorbell = Doorbell {
            offset: 0x10,
            fd: EventFd::new(0).unwrap(),
        };
        let function = Arc::new(Mutex::new(Plain::new(number)));
        let device = root.lock().unwrap().insert(function, Some(doorbell));
        assert_eq!(device, Some(number.into()));
    }
    Machine {
        bus,
        heard,
        ecam: Ecam(root.clone()),
        ports: ConfigPorts(root.clone()),
        root,
    }
}

impl Machine {
    fn set(&mut self, device: u64, at: u64, value: u32) {
        self.ecam.write(device << 15 | at, &value.to_le_bytes());
    }

    fn get(&mut self, device: u64, at: u64) -> u32 {
        let mut data = [0xff; 4];
        self.ecam.read(device << 15 | at, &mut data);
        u32::from_le_bytes(data)
    }

    fn port(&mut self, address: u32) -> u32 {
        self.ports.write(0, &address.to_le_bytes());
        let mut data = [0xff; 4];
        self.ports.read(4, &mut data);
        u32::from_le_bytes(data)
    }

    fn answers(&self, addr: u64) -> Option<u8> {
        let mut data = [0];
        self.bus.read(addr, &mut data).then(|| data[0])
    }
}

#[test]
fn ports_and_ecam_lead_to_the_same_registers() {
    let mut machine = machine(3);
    assert_eq!(machine.get(0, 0), 0x1237_8086, "the bridge");
    for device in 1..=3 {
        let identity = machine.get(device, 0);
        assert_eq!(identity, 0x1234 | (device as u32) << 16);
        assert_eq!(machine.port(1 << 31 | (device as u32) << 11), identity);
    }
    machine.set(2, 0x3c, 0x0b);
    assert_eq!(machine.port(1 << 31 | 2 << 11 | 0x3c), 0x0b);
    // One byte of a register, through the data port.
    machine.ports.write(4, &[0x0c]);
    assert_eq!(machine.get(2, 0x3c), 0x0c);
    let mut byte = [0xff];
    machine
        .ports
        .write(0, &(1u32 << 31 | 2 << 11).to_le_bytes());
    machine.ports.read(7, &mut byte);
    assert_eq!(byte, [0], "the high byte of the device number");
}

#[test]
fn what_is_not_there_reads_as_all_ones() {
    let mut machine = machine(1);
    assert_eq!(machine.get(2, 0), u32::MAX);
    assert_eq!(machine.get(31, 0), u32::MAX);
    assert_eq!(machine.port(1 << 31 | 2 << 11), u32::MAX);
    assert_eq!(machine.port(1 << 31 | 1 << 16), u32::MAX, "another bus");
    assert_eq!(machine.port(1 << 31 | 1 << 8), u32::MAX, "another function");
    assert_eq!(machine.port(1 << 11), u32::MAX, "not enabled");
    for offset in [1 << 12, 1 << 20, u64::MAX, 0xffe] {
        let mut data = [0xff; 4];
        machine.ecam.read(offset, &mut data);
        assert_eq!(data, [0xff; 4], "{offset:#x}");
        machine.ecam.write(offset, &data);
    }
    let mut data = [0xff; 4];
    machine.ports.write(0, &(1u32 << 31).to_le_bytes());
    machine.ports.read(6, &mut data);
    assert_eq!(data, [0xff; 4], "over the end");
}

#[test]
fn a_bar_answers_where_it_is_and_rings_there() {
    let mut machine = machine(2);
    let base = HOST_BRIDGE.memory.start;
    assert_eq!(machine.answers(base), None, "not enabled");
    for device in [1, 2] {
        machine.set(device, COMMAND as u64, COMMAND_MEMORY.into());
    }
    assert_eq!(machine.answers(base), Some(1));
    assert_eq!(machine.answers(base + LEN), Some(2));
    let rings = [base + 0x10, base + LEN + 0x10];
    assert_eq!(*machine.heard.0.lock().unwrap(), rings);
    machine.set(1, BAR0 as u64, 0xf000_0000);
    assert_eq!(machine.answers(base), None);
    assert_eq!(machine.answers(0xf000_0000), Some(1));
    let rings = [base + LEN + 0x10, 0xf000_0010];
    assert_eq!(*machine.heard.0.lock().unwrap(), rings);
    machine.set(1, COMMAND as u64, 0);
    assert_eq!(machine.answers(0xf000_0000), None);
    assert_eq!(machine.heard.0.lock().unwrap().len(), 1);
}

#[test]
fn bars_over_each_other_or_over_the_machine_hide_nothing_else() {
    let mut machine = machine(2);
    let other = Arc::new(Mutex::new(Plain::new(9)));
    machine.bus.insert(0xd000_0000, 0x100, other).unwrap();
    for device in [1, 2] {
        machine.set(device, COMMAND as u64, COMMAND_MEMORY.into());
        machine.set(device, BAR0 as u64, 0xd000_0000);
    }
    assert_eq!(machine.answers(0xd000_0000), Some(9));
    assert_eq!(machine.answers(0xd000_0800), None);
    for device in [2, 1] {
        machine.set(device, BAR0 as u64, 0xf000_0000);
    }
    assert_eq!(machine.answers(0xf000_0000), Some(1), "the first");
    machine.set(1, BAR0 as u64, 0xffff_f000);
    assert_eq!(machine.answers(0xf000_0000), Some(2), "and now the other");
    assert_eq!(machine.answers(0xffff_ffff), Some(1));
}

#[test]
fn the_bridge_is_part_of_the_checkpoint() {
    let mut one = machine(1);
    one.port(1 << 31 | 1 << 11 | 0x3c);
    one.set(0, 0x58, 0xffff_ffff);
    let bytes = saved(&*one.root.lock().unwrap());
    let mut two = machine(1);
    two.root.lock().unwrap().load(1, &bytes).unwrap();
    assert!(saved(&*two.root.lock().unwrap()) == bytes);
    assert_eq!(two.get(0, 0x58), 0xffff_ff00);
    let three = machine(1);
    assert_refuses_damage(&mut *three.root.lock().unwrap(), &bytes);
}

#[test]
fn the_bus_has_31_places() {
    let machine = machine(31);
    let one_more = Arc::new(Mutex::new(Plain::new(32)));
    let mut root = machine.root.lock().unwrap();
    assert_eq!(root.insert(one_more, None), None);
}
