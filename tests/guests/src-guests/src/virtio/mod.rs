//! Devices on virtio-mmio: where they are, how they are started.
//!
//! A Linux-style command line names them (`virtio_mmio.device=4K@0xd0000000:5`); without one, the
//! places where QEMU's `microvm` puts them are tried. Both register layouts are spoken: the modern
//! one, and the legacy one that QEMU still defaults to.

pub mod blk;
pub mod net;
mod queue;

use core::fmt;

use crate::cmdline::{CommandLine, parse_number};
use crate::cpu::{peek8, peek32, poke32};
use crate::interrupts;
use queue::Queue;

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

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

const F_ANY_LAYOUT: u64 = 1 << 27;
const F_VERSION_1: u64 = 1 << 32;

const QEMU_BASE: u64 = 0xFEB0_0000;
const QEMU_STRIDE: u64 = 0x200;
const QEMU_SLOTS: u64 = 24;
/// The second I/O APIC of QEMU's `microvm`.
const QEMU_IOAPIC: u64 = 0xFEC1_0000;
/// The first interrupt `microvm` gives to a virtio device.
const QEMU_FIRST_PIN: u32 = 5;

/// One transport with a device behind it.
#[derive(Debug, Clone, Copy)]
pub struct Transport {
    base: u64,
    legacy: bool,
}

/// Why a device cannot be used.
#[derive(Debug, Clone, Copy)]
pub enum Trouble {
    /// There is none of this kind.
    Absent,
    /// It did not accept the features of this driver.
    Features,
    /// It lacks this queue.
    Queue(u32),
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let layout = if self.legacy { "legacy" } else { "modern" };
        write!(f, "virtio-mmio@{:#x} ({layout})", self.base)
    }
}

impl Transport {
    /// Finds the first device of a kind, and routes its interrupt to this processor.
    ///
    /// # Errors
    /// If there is none.
    pub fn find(cmdline: &CommandLine, kind: u32) -> Result<Self, Trouble> {
        let mut named = cmdline
            .words()
            .filter_map(|word| {
                word.strip_prefix("virtio_mmio.device=")
                    .and_then(parse_place)
            })
            .peekable();
        if named.peek().is_some() {
            let (found, pin) = named
                .find_map(|(base, pin)| Some((Self::at(base, kind)?, pin)))
                .ok_or(Trouble::Absent)?;
            interrupts::route(interrupts::IOAPIC, pin);
            return Ok(found);
        }
        let found = (0..QEMU_SLOTS)
            .find_map(|slot| Self::at(QEMU_BASE + slot * QEMU_STRIDE, kind))
            .ok_or(Trouble::Absent)?;
        // Which pin it is depends on the machine's options; no other device is in use.
        for (ioapic, first) in [(interrupts::IOAPIC, QEMU_FIRST_PIN), (QEMU_IOAPIC, 0)] {
            for pin in first..interrupts::pins(ioapic).unwrap_or(0) {
                interrupts::route(ioapic, pin);
            }
        }
        Ok(found)
    }

    fn at(base: u64, kind: u32) -> Option<Self> {
        let version = peek32(base + 4);
        (peek32(base) == MAGIC && peek32(base + DEVICE_ID) == kind && matches!(version, 1 | 2))
            .then_some(Self {
                base,
                legacy: version == 1,
            })
    }

    /// Resets the device and agrees on features; returns those of `wanted` that it has.
    fn begin(&self, wanted: u64) -> Result<u64, Trouble> {
        self.set(STATUS, 0);
        self.set(STATUS, ACKNOWLEDGE);
        self.set(STATUS, ACKNOWLEDGE | DRIVER);
        let mut offered = 0;
        for half in 0..2 {
            self.set(DEVICE_FEATURES_SELECT, half);
            offered |= u64::from(self.read(DEVICE_FEATURES)) << (32 * half);
        }
        let required = if self.legacy { 0 } else { F_VERSION_1 };
        if offered & required != required {
            return Err(Trouble::Features);
        }
        let accepted = offered & (wanted | required);
        for half in 0..2 {
            self.set(DRIVER_FEATURES_SELECT, half);
            self.set(DRIVER_FEATURES, (accepted >> (32 * half)) as u32);
        }
        if self.legacy {
            self.set(LEGACY_PAGE_SIZE, 4096);
        } else {
            self.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
            if self.read(STATUS) & FEATURES_OK == 0 {
                return Err(Trouble::Features);
            }
        }
        Ok(accepted)
    }

    /// Sets up a queue of at most `size` entries.
    fn queue(&self, index: u32, size: u16) -> Result<Queue, Trouble> {
        self.set(QUEUE_SELECT, index);
        let limit = self.read(QUEUE_SIZE_LIMIT);
        let size = u32::from(size).min(limit);
        if size == 0 {
            return Err(Trouble::Queue(index));
        }
        let queue = Queue::new(size as u16);
        self.set(QUEUE_SIZE, size);
        if self.legacy {
            self.set(LEGACY_QUEUE_ALIGN, 4096);
            self.set(LEGACY_QUEUE_PAGE, (queue.descriptors() >> 12) as u32);
        } else {
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
        Ok(queue)
    }

    fn ready(&self) {
        let agreed = if self.legacy { 0 } else { FEATURES_OK };
        self.set(STATUS, ACKNOWLEDGE | DRIVER | agreed | DRIVER_OK);
    }

    /// Lowers the device's interrupt. Do this on every wake-up and before looking at the queues.
    pub fn acknowledge(&self) {
        self.set(INTERRUPT_ACKNOWLEDGE, 3);
    }

    fn notify(&self, queue: u32) {
        self.set(QUEUE_NOTIFY, queue);
    }

    fn config8(&self, offset: u64) -> u8 {
        peek8(self.base + CONFIG + offset)
    }

    fn config32(&self, offset: u64) -> u32 {
        self.read(CONFIG + offset)
    }

    fn read(&self, register: u64) -> u32 {
        peek32(self.base + register)
    }

    fn set(&self, register: u64, value: u32) {
        poke32(self.base + register, value);
    }
}

/// `SIZE@BASE:IRQ[:ID]` as base and interrupt.
fn parse_place(text: &str) -> Option<(u64, u32)> {
    let (_, place) = text.split_once('@')?;
    let mut parts = place.split(':');
    let base = parse_number(parts.next()?)?;
    let pin = parse_number(parts.next()?)?;
    (base < 1 << 32 && base % 4 == 0 && pin < 24).then_some((base, pin as u32))
}
