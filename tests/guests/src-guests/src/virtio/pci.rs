//! Modern devices on PCI bus 0, with one MSI-X message for everything.

use core::fmt;

use super::queue::Queue;
use crate::cpu::{in32, out32, peek8, peek16, peek32, poke8, poke16, poke32};
use crate::interrupts;

const ADDRESS: u16 = 0xCF8;
const DATA: u16 = 0xCFC;
const DEVICES: u32 = 32;

const VENDOR: u32 = 0x1AF4;
const MODERN: u32 = 0x1040;
/// Devices that a legacy driver could drive too say what they are elsewhere.
const TRANSITIONAL: core::ops::Range<u32> = 0x1000..0x1040;

const COMMAND: u32 = 0x04;
const MEMORY_AND_MASTER: u32 = 6;
const BARS: u32 = 0x10;
const SUBSYSTEM: u32 = 0x2C;
const CAPABILITIES: u32 = 0x34;
const CAP_VENDOR: u32 = 0x09;
const CAP_MSIX: u32 = 0x11;
const MSIX_ENABLE: u32 = 1 << 31;
const CFG_COMMON: u32 = 1;
const CFG_NOTIFY: u32 = 2;
const CFG_DEVICE: u32 = 4;

const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0C;
const CONFIG_VECTOR: u64 = 0x10;
const STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1A;
const QUEUE_ENABLE: u64 = 0x1C;
const QUEUE_NOTIFY_OFF: u64 = 0x1E;
const QUEUE_DESCRIPTORS: u64 = 0x20;
const QUEUE_AVAILABLE: u64 = 0x28;
const QUEUE_USED: u64 = 0x30;

/// The only message in use.
const VECTOR: u16 = 0;

/// One function.
#[derive(Debug, Clone, Copy)]
pub struct Pci {
    device: u32,
    common: u64,
    notify: u64,
    multiplier: u64,
    config: u64,
}

impl fmt::Display for Pci {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "virtio-pci@00:{:02x}.0", self.device)
    }
}

impl Pci {
    /// The first device of a kind on bus 0.
    pub(super) fn find(kind: u32) -> Option<Self> {
        (0..DEVICES).find_map(|device| Self::at(device, kind))
    }

    fn at(device: u32, kind: u32) -> Option<Self> {
        let identity = read(device, 0);
        let number = identity >> 16;
        let is_kind = number == MODERN + kind
            || TRANSITIONAL.contains(&number) && read(device, SUBSYSTEM) >> 16 == kind;
        if identity & 0xFFFF != VENDOR || !is_kind {
            return None;
        }
        write(device, COMMAND, read(device, COMMAND) & 0xFFFF | MEMORY_AND_MASTER);
        let mut found = Self {
            device,
            common: 0,
            notify: 0,
            multiplier: 0,
            config: 0,
        };
        let mut at = read(device, CAPABILITIES) & 0xFC;
        // A list has at most 48 entries.
        for _ in 0..48 {
            if at == 0 {
                break;
            }
            let head = read(device, at);
            match head & 0xFF {
                CAP_VENDOR => found.learn(at, head >> 24),
                CAP_MSIX => enable_message(device, at),
                _ => {}
            }
            at = head >> 8 & 0xFC;
        }
        (found.common != 0 && found.notify != 0).then_some(found)
    }

    fn learn(&mut self, at: u32, kind: u32) {
        let place = bar(self.device, read(self.device, at + 4) & 0xFF)
            + u64::from(read(self.device, at + 8));
        match kind {
            CFG_COMMON => self.common = place,
            CFG_DEVICE => self.config = place,
            CFG_NOTIFY => {
                self.notify = place;
                self.multiplier = read(self.device, at + 16).into();
            }
            _ => {}
        }
    }

    pub(super) fn offered(&self, half: u32) -> u32 {
        poke32(self.common + DEVICE_FEATURE_SELECT, half);
        peek32(self.common + DEVICE_FEATURE)
    }

    pub(super) fn accept(&self, half: u32, features: u32) {
        poke32(self.common + DRIVER_FEATURE_SELECT, half);
        poke32(self.common + DRIVER_FEATURE, features);
    }

    pub(super) fn status(&self) -> u32 {
        peek8(self.common + STATUS).into()
    }

    pub(super) fn set_status(&self, status: u32) {
        poke8(self.common + STATUS, status as u8);
        if status == 0 {
            // A reset is over when the status reads as zero.
            while self.status() != 0 {}
            poke16(self.common + CONFIG_VECTOR, VECTOR);
        }
    }

    /// Selects a queue and says how long it may be.
    pub(super) fn select(&self, index: u32) -> u32 {
        poke16(self.common + QUEUE_SELECT, index as u16);
        peek16(self.common + QUEUE_SIZE).into()
    }

    /// Starts the selected queue.
    pub(super) fn start(&self, queue: &Queue) {
        poke16(self.common + QUEUE_SIZE, queue.size());
        poke16(self.common + QUEUE_VECTOR, VECTOR);
        for (register, address) in [
            (QUEUE_DESCRIPTORS, queue.descriptors()),
            (QUEUE_AVAILABLE, queue.available()),
            (QUEUE_USED, queue.used()),
        ] {
            poke32(self.common + register, address as u32);
            poke32(self.common + register + 4, (address >> 32) as u32);
        }
        poke16(self.common + QUEUE_ENABLE, 1);
    }

    pub(super) fn notify(&self, queue: u32) {
        let offset = if self.multiplier == 0 {
            0
        } else {
            poke16(self.common + QUEUE_SELECT, queue as u16);
            u64::from(peek16(self.common + QUEUE_NOTIFY_OFF)) * self.multiplier
        };
        poke16(self.notify + offset, queue as u16);
    }

    pub(super) fn config8(&self, offset: u64) -> u8 {
        peek8(self.config + offset)
    }

    pub(super) fn config32(&self, offset: u64) -> u32 {
        peek32(self.config + offset)
    }
}

/// Where a BAR of memory below 4 GiB is.
fn bar(device: u32, index: u32) -> u64 {
    u64::from(read(device, BARS + 4 * (index & 7)) & !0xF)
}

/// Lets the first message interrupt this processor.
fn enable_message(device: u32, at: u32) {
    let table = read(device, at + 4);
    let entry = bar(device, table & 7) + u64::from(table & !7);
    let (address, data) = interrupts::message();
    write(device, at, read(device, at) | MSIX_ENABLE);
    for (offset, word) in [(0, address), (4, 0), (8, data), (12, 0)] {
        poke32(entry + offset, word);
    }
}

fn read(device: u32, register: u32) -> u32 {
    out32(ADDRESS, 1 << 31 | device << 11 | register);
    in32(DATA)
}

fn write(device: u32, register: u32, value: u32) {
    out32(ADDRESS, 1 << 31 | device << 11 | register);
    out32(DATA, value);
}
