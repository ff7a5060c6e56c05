//! Devices on virtio-mmio. Both register layouts are spoken: the modern one, and the legacy one that
//! QEMU still defaults to.

use core::fmt;

use super::queue::Queue;
use crate::cmdline::{CommandLine, parse_number};
use crate::cpu::{peek8, peek32, poke32};
use crate::interrupts;

const MAGIC: u32 = 0x7472_6976;

const DEVICE_ID: u64 = 0x008;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SELECT: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SELECT: u64 = 0x024;
const LEGACY_PAGE_SIZE: u64 = 0x028;
const QUEUE_SELECT: u64 = 0x030;
const QUEUE_SIZE_LIMIT: u64 = 0x034;
const QUEUE_SIZE: u64 = 0x038;
const LEGACY_QUEUE_ALIGN: u64 = 0x03C;
const LEGACY_QUEUE_PAGE: u64 = 0x040;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_ACKNOWLEDGE: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESCRIPTORS: u64 = 0x080;
const QUEUE_AVAILABLE: u64 = 0x090;
const QUEUE_USED: u64 = 0x0A0;
const CONFIG: u64 = 0x100;

const QEMU_BASE: u64 = 0xFEB0_0000;
const QEMU_STRIDE: u64 = 0x200;
const QEMU_SLOTS: u64 = 24;
/// The second I/O APIC of QEMU's `microvm`.
const QEMU_IOAPIC: u64 = 0xFEC1_0000;
/// The first interrupt `microvm` gives to a virtio device.
const QEMU_FIRST_PIN: u32 = 5;

/// One device.
#[derive(Debug, Clone, Copy)]
pub struct Mmio {
    base: u64,
    legacy: bool,
}

impl fmt::Display for Mmio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let layout = if self.legacy { "legacy" } else { "modern" };
        write!(f, "virtio-mmio@{:#x} ({layout})", self.base)
    }
}

impl Mmio {
    /// The first device of a kind that the command line names.
    pub(super) fn named(cmdline: &CommandLine, kind: u32) -> Option<Self> {
        let (found, pin) =
            places(cmdline).find_map(|(base, pin)| Some((Self::at(base, kind)?, pin)))?;
        interrupts::route(interrupts::IOAPIC, pin);
        Some(found)
    }

    /// The first device of a kind where QEMU's `microvm` puts them, unless the command line names others.
    pub(super) fn in_microvm(cmdline: &CommandLine, kind: u32) -> Option<Self> {
        if places(cmdline).next().is_some() {
            return None;
        }
        let found =
            (0..QEMU_SLOTS).find_map(|slot| Self::at(QEMU_BASE + slot * QEMU_STRIDE, kind))?;
        // Which pin it is depends on the machine's options; no other device is in use.
        for (ioapic, first) in [(interrupts::IOAPIC, QEMU_FIRST_PIN), (QEMU_IOAPIC, 0)] {
            for pin in first..interrupts::pins(ioapic).unwrap_or(0) {
                interrupts::route(ioapic, pin);
            }
        }
        Some(found)
    }

    fn at(base: u64, kind: u32) -> Option<Self> {
        let version = peek32(base + 4);
        (peek32(base) == MAGIC && peek32(base + DEVICE_ID) == kind && matches!(version, 1 | 2))
            .then_some(Self {
                base,
                legacy: version == 1,
            })
    }

    pub(super) fn legacy(&self) -> bool {
        self.legacy
    }

    pub(super) fn offered(&self, half: u32) -> u32 {
        self.set(DEVICE_FEATURES_SELECT, half);
        self.read(DEVICE_FEATURES)
    }

    pub(super) fn accept(&self, half: u32, features: u32) {
        self.set(DRIVER_FEATURES_SELECT, half);
        self.set(DRIVER_FEATURES, features);
        if self.legacy {
            self.set(LEGACY_PAGE_SIZE, 4096);
        }
    }

    pub(super) fn status(&self) -> u32 {
        self.read(STATUS)
    }

    pub(super) fn set_status(&self, status: u32) {
        self.set(STATUS, status);
    }

    /// Selects a queue and says how long it may be.
    pub(super) fn select(&self, index: u32) -> u32 {
        self.set(QUEUE_SELECT, index);
        self.read(QUEUE_SIZE_LIMIT)
    }

    /// Starts the selected queue.
    pub(super) fn start(&self, queue: &Queue) {
        self.set(QUEUE_SIZE, queue.size().into());
        if self.legacy {
            self.set(LEGACY_QUEUE_ALIGN, 4096);
            self.set(LEGACY_QUEUE_PAGE, (queue.descriptors() >> 12) as u32);
            return;
        }
        for (register, address) in [
            (QUEUE_DESCRIPTORS, queue.descriptors()),
            (QUEUE_AVAILABLE, queue.available()),
            (QUEUE_USED, queue.used()),
        ] {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(QUEUE_READY, 1);
    }

    pub(super) fn acknowledge(&self) {
        self.set(INTERRUPT_ACKNOWLEDGE, 3);
    }

    pub(super) fn notify(&self, queue: u32) {
        self.set(QUEUE_NOTIFY, queue);
    }

    pub(super) fn config8(&self, offset: u64) -> u8 {
        peek8(self.base + CONFIG + offset)
    }

    pub(super) fn config32(&self, offset: u64) -> u32 {
        self.read(CONFIG + offset)
    }

    fn read(&self, register: u64) -> u32 {
        peek32(self.base + register)
    }

    fn set(&self, register: u64, value: u32) {
        poke32(self.base + register, value);
    }
}

fn places(cmdline: &CommandLine) -> impl Iterator<Item = (u64, u32)> {
    cmdline.words().filter_map(|word| {
        word.strip_prefix("virtio_mmio.device=")
            .and_then(parse_place)
    })
}

/// `SIZE@BASE:IRQ[:ID]` as base and interrupt.
fn parse_place(text: &str) -> Option<(u64, u32)> {
    let (_, place) = text.split_once('@')?;
    let mut parts = place.split(':');
    let base = parse_number(parts.next()?)?;
    let pin = parse_number(parts.next()?)?;
    (base < 1 << 32 && base % 4 == 0 && pin < 24).then_some((base, pin as u32))
}
