//! The body of the fuzz target `virtio_mmio`: a guest that does anything, against every device behind the transport.
//!
//! The input is a program: which device, then operations on registers, guest RAM and the device's host side, with
//! checkpoints in between. Some operations do what an honest driver does, so that the dishonest ones meet a device
//! that is up. What must hold whatever the guest does:
//!
//! * no call panics, and each returns after bounded work (the fuzzer's own time limit);
//! * a quiesced device changes neither RAM nor the interrupt line;
//! * saving, loading and saving again gives the same section; one changed byte in it is refused.

use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM,
    VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_STATUS,
};
use vm_memory::{Bytes as _, GuestAddress};

use super::virtio::{Block, Console, Disk, Net, NetConfig, Offloads, Rng, SavedDevice, Virtio};
use super::{BusDevice as _, Irq, Persist as _, Sink};
use crate::memory::GuestRam;

const RAM: usize = 0x1_0000;
/// Rings are laid out here, one after the other.
const RINGS: u64 = 0x1000;
const RING_BYTES: u64 = 0x1000;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;

/// Runs one program; a panic is a finding.
pub fn virtio_mmio(program: &[u8]) {
    let mut input = Input(program);
    let kind = input.byte();
    let offloads = Offloads {
        checksum: kind & 0x10 != 0,
        segmentation: kind & 0x20 != 0,
    };
    match kind % 4 {
        0 => {
            let config = NetConfig {
                mac: [2; 6],
                offloads,
            };
            run(|| Net::new(config), net, &mut input);
        }
        1 => {
            let disk = disk();
            run(|| Block::new(disk.clone(), "fuzz"), |_, _| {}, &mut input);
        }
        2 => run(Rng::new, |_, _| {}, &mut input),
        _ => run(|| Console::new(Sink::null()), console, &mut input),
    }
}

fn run<D: SavedDevice>(
    device: impl Fn() -> D,
    host: impl Fn(&mut Virtio<D>, &mut Input<'_>),
    input: &mut Input<'_>,
) {
    let Ok(ram) = GuestRam::from_ranges(&[(GuestAddress(0), RAM)]) else {
        return;
    };
    let make = || Virtio::new("fuzz0", device(), ram.clone(), Irq::new()?);
    let Ok(mut mmio) = make() else {
        return;
    };
    while let Some(operation) = input.next() {
        match operation % 12 {
            0 => start(&mut mmio, input),
            1 => mmio.write(u64::from(input.half()), &input.word().to_le_bytes()),
            2 => {
                let register = u64::from(input.byte()) * 4;
                mmio.write(register, &input.word().to_le_bytes());
            }
            3 => {
                let offset = u64::from(input.half());
                let data = input.bytes();
                mmio.write(offset, data);
                mmio.read(offset, &mut vec![0; data.len()]);
            }
            4 => poke(&ram, u64::from(input.half()), input.bytes()),
            5 => descriptor(&ram, input),
            6 | 7 => publish(&ram, input),
            8 => mmio.write(VIRTIO_MMIO_QUEUE_NOTIFY.into(), &input.word().to_le_bytes()),
            9 => mmio.serve(),
            10 => host(&mut mmio, input),
            _ => {
                let Ok(other) = make() else {
                    return;
                };
                mmio = checkpoint(mmio, other, &ram, &host, input);
            }
        }
    }
}

/// What a driver does first, with ring sizes and features of the input's choice.
fn start<D: SavedDevice>(mmio: &mut Virtio<D>, input: &mut Input<'_>) {
    let mut set = |register: u32, value: u32| {
        mmio.write(register.into(), &value.to_le_bytes());
    };
    set(VIRTIO_MMIO_STATUS, 0);
    set(VIRTIO_MMIO_STATUS, 1 | 2);
    set(VIRTIO_MMIO_DRIVER_FEATURES, input.word());
    set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    set(VIRTIO_MMIO_DRIVER_FEATURES, 1);
    set(VIRTIO_MMIO_STATUS, 1 | 2 | 8);
    let size = 1 << (input.byte() % 7);
    for ring in 0..2 {
        let base = RINGS as u32 + RING_BYTES as u32 * ring;
        set(VIRTIO_MMIO_QUEUE_SEL, ring);
        set(VIRTIO_MMIO_QUEUE_NUM, size);
        set(VIRTIO_MMIO_QUEUE_DESC_LOW, base);
        set(VIRTIO_MMIO_QUEUE_AVAIL_LOW, base + AVAILABLE as u32);
        set(VIRTIO_MMIO_QUEUE_USED_LOW, base + USED as u32);
        set(VIRTIO_MMIO_QUEUE_READY, 1);
    }
    set(VIRTIO_MMIO_STATUS, 1 | 2 | 4 | 8);
}

/// A descriptor that is nearly honest: a short buffer in RAM, linked to its neighbour or anywhere.
fn descriptor(ram: &GuestRam, input: &mut Input<'_>) {
    let place = input.byte();
    let ring = u64::from(place >> 7);
    let index = u16::from(place & 63);
    let flags = u16::from(input.byte());
    let next = if flags & 0x80 != 0 {
        input.half()
    } else {
        index + 1
    };
    let mut bytes = Vec::with_capacity(16);
    bytes.extend(u64::from(input.half()).to_le_bytes());
    bytes.extend(u32::from(input.half() & 0x3ff).to_le_bytes());
    bytes.extend((flags & 7).to_le_bytes());
    bytes.extend(next.to_le_bytes());
    poke(
        ram,
        RINGS + RING_BYTES * ring + 16 * u64::from(index),
        &bytes,
    );
}

/// Makes some heads visible, mostly as many as there are.
fn publish(ram: &GuestRam, input: &mut Input<'_>) {
    let ring = u64::from(input.byte() & 1);
    let base = RINGS + RING_BYTES * ring + AVAILABLE;
    let Ok(index) = ram.read_obj::<u16>(GuestAddress(base + 2)) else {
        return;
    };
    let heads = input.bytes();
    for (at, &head) in (u64::from(index)..).zip(heads) {
        let slot = base + 4 + 2 * (at % 64);
        poke(ram, slot, &u16::from(head & 63).to_le_bytes());
    }
    let index = index.wrapping_add(heads.len() as u16);
    poke(ram, base + 2, &index.to_le_bytes());
}

/// Moves the device into another one, over the same RAM.
fn checkpoint<D: SavedDevice>(
    mut mmio: Virtio<D>,
    mut other: Virtio<D>,
    ram: &GuestRam,
    host: &impl Fn(&mut Virtio<D>, &mut Input<'_>),
    input: &mut Input<'_>,
) -> Virtio<D> {
    mmio.quiesce();
    let raised = |mmio: &Virtio<D>| {
        let line = mmio.interrupts().line();
        line.is_some_and(|line| line.fd().read().is_ok())
    };
    let _raised_before = raised(&mmio);
    let before = contents(ram);
    host(&mut mmio, input);
    mmio.serve();
    mmio.write(VIRTIO_MMIO_QUEUE_NOTIFY.into(), &input.word().to_le_bytes());
    assert!(contents(ram) == before, "a quiesced device wrote to RAM");
    assert!(!raised(&mmio), "it raised its interrupt");

    let mut section = Vec::new();
    mmio.save(&mut section);
    other.quiesce();
    let loaded = other.load(mmio.version(), &section);
    assert_eq!(loaded, Ok(()), "what was saved can be loaded");
    let mut again = Vec::new();
    other.save(&mut again);
    assert_eq!(again, section, "and is saved the same");
    let at = usize::from(input.half()) % section.len();
    if let Some(byte) = section.get_mut(at) {
        *byte ^= input.byte().max(1);
    }
    assert!(other.check(mmio.version(), &section).is_err(), "damage");
    other.resume();
    other
}

fn net(mmio: &mut Virtio<Net>, input: &mut Input<'_>) {
    let what = input.byte();
    match what % 3 {
        0 => {
            let budget = usize::from(input.byte()) + 1;
            let mut frames = 0;
            let taken = mmio.poll_tx(budget, &mut |_, frame| {
                assert!(!frame.is_empty() && frame.len() <= 65_562);
                frames += 1;
            });
            assert!(frames <= taken && taken <= budget);
        }
        1 => {
            let frame = vec![what; usize::from(input.half())];
            let index = mmio.consumed_inputs() + 1;
            mmio.rx(index, &frame);
        }
        _ => mmio.set_link(what & 0x80 != 0),
    }
}

fn console(mmio: &mut Virtio<Console>, input: &mut Input<'_>) {
    mmio.input(input.bytes());
}

#[expect(clippy::expect_used, reason = "the fuzzer's own host is at fault")]
fn disk() -> Arc<Disk> {
    let file = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a memory file");
    ftruncate(&file, 64 << 10).expect("64 KiB of memory");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Arc::new(Disk::open(Path::new(&path), false).expect("an image of 64 KiB"))
}

fn poke(ram: &GuestRam, at: u64, bytes: &[u8]) {
    // Outside RAM there is nothing to write.
    let _outside = ram.write_slice(bytes, GuestAddress(at));
}

fn contents(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; RAM];
    let read = ram.read_slice(&mut bytes, GuestAddress(0));
    assert!(read.is_ok(), "all of RAM is there");
    bytes
}

/// The rest of the program; zeroes behind its end.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn next(&mut self) -> Option<u8> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    fn byte(&mut self) -> u8 {
        self.next().unwrap_or(0)
    }

    fn half(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn word(&mut self) -> u32 {
        u32::from(self.half()) | u32::from(self.half()) << 16
    }

    /// Up to 31 bytes.
    fn bytes(&mut self) -> &'a [u8] {
        let len = usize::from(self.byte() & 31).min(self.0.len());
        let (bytes, rest) = self.0.split_at(len);
        self.0 = rest;
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{ProptestConfig, any, prop, proptest};

    use super::*;

    #[test]
    fn every_seed_keeps_the_laws() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
        let mut seeds = 0;
        for folder in ["corpus/virtio_mmio", "regressions/virtio_mmio"] {
            let Ok(files) = std::fs::read_dir(root.join(folder)) else {
                continue;
            };
            for file in files {
                virtio_mmio(&std::fs::read(file.unwrap().path()).unwrap());
                seeds += 1;
            }
        }
        assert!(seeds > 0, "no seeds for virtio_mmio");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn no_guest_hurts_any_device(program in prop::collection::vec(any::<u8>(), 0..1024)) {
            virtio_mmio(&program);
        }

        /// The same, with the device brought up before anything else.
        #[test]
        fn no_driver_hurts_any_device(
            device in 0..64u8,
            program in prop::collection::vec(any::<u8>(), 0..1024),
        ) {
            let start = [device, 0, 0, 0, 0, 0, 6];
            virtio_mmio(&[&start[..], &program].concat());
        }
    }

    #[test]
    fn programs_reach_the_rings() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
        let mut mmio = Virtio::new("fuzz0", Rng::new(), ram.clone(), Irq::new().unwrap()).unwrap();
        start(&mut mmio, &mut Input(&[0, 0, 0, 0, 6]));
        assert!(mmio.has_driver());
        descriptor(&ram, &mut Input(&[0, 2, 0, 0x80, 32, 0]));
        publish(&ram, &mut Input(&[0, 1, 0]));
        mmio.serve();
        assert_eq!(mmio.device().given(), 32);
    }
}
