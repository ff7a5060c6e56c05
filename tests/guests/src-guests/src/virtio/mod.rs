//! Virtio devices: where they are, how they are started.
//!
//! A Linux-style command line names those on MMIO (`virtio_mmio.device=4K@0xd0000000:5`). Then PCI is
//! looked at, and last the places where QEMU's `microvm` puts its devices.

pub mod blk;
mod mmio;
pub mod net;
mod pci;
mod queue;

use core::fmt;

use crate::cmdline::CommandLine;
use mmio::Mmio;
use pci::Pci;
use queue::Queue;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

const F_ANY_LAYOUT: u64 = 1 << 27;
const F_VERSION_1: u64 = 1 << 32;

/// One transport with a device behind it.
#[derive(Debug, Clone, Copy)]
pub enum Transport {
    /// Registers at an address, and an interrupt line.
    Mmio(Mmio),
    /// A function, with a message.
    Pci(Pci),
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
        match self {
            Self::Mmio(mmio) => mmio.fmt(f),
            Self::Pci(pci) => pci.fmt(f),
        }
    }
}

impl Transport {
    /// Finds the first device of a kind, and routes its interrupt to this processor.
    ///
    /// # Errors
    /// If there is none.
    pub fn find(cmdline: &CommandLine, kind: u32) -> Result<Self, Trouble> {
        if let Some(named) = Mmio::named(cmdline, kind) {
            return Ok(Self::Mmio(named));
        }
        if let Some(function) = Pci::find(kind) {
            return Ok(Self::Pci(function));
        }
        Mmio::in_microvm(cmdline, kind)
            .map(Self::Mmio)
            .ok_or(Trouble::Absent)
    }

    fn legacy(&self) -> bool {
        matches!(self, Self::Mmio(mmio) if mmio.legacy())
    }

    /// Resets the device and agrees on features; returns those of `wanted` that it has.
    fn begin(&self, wanted: u64) -> Result<u64, Trouble> {
        self.set_status(0);
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        let offered = u64::from(self.offered(0)) | u64::from(self.offered(1)) << 32;
        let required = if self.legacy() { 0 } else { F_VERSION_1 };
        if offered & required != required {
            return Err(Trouble::Features);
        }
        let accepted = offered & (wanted | required);
        self.accept(0, accepted as u32);
        self.accept(1, (accepted >> 32) as u32);
        if !self.legacy() {
            self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
            if self.status() & FEATURES_OK == 0 {
                return Err(Trouble::Features);
            }
        }
        Ok(accepted)
    }

    /// Sets up a queue of at most `size` entries.
    fn queue(&self, index: u32, size: u16) -> Result<Queue, Trouble> {
        let limit = match self {
            Self::Mmio(mmio) => mmio.select(index),
            Self::Pci(pci) => pci.select(index),
        };
        let size = u32::from(size).min(limit) as u16;
        if size == 0 {
            return Err(Trouble::Queue(index));
        }
        let queue = Queue::new(size);
        match self {
            Self::Mmio(mmio) => mmio.start(&queue),
            Self::Pci(pci) => pci.start(&queue),
        }
        Ok(queue)
    }

    fn ready(&self) {
        let agreed = if self.legacy() { 0 } else { FEATURES_OK };
        self.set_status(ACKNOWLEDGE | DRIVER | agreed | DRIVER_OK);
    }

    /// Lowers the device's interrupt. Do this on every wake-up and before looking at the queues.
    pub fn acknowledge(&self) {
        match self {
            Self::Mmio(mmio) => mmio.acknowledge(),
            // A message is not acknowledged.
            Self::Pci(_) => {}
        }
    }

    fn notify(&self, queue: u32) {
        match self {
            Self::Mmio(mmio) => mmio.notify(queue),
            Self::Pci(pci) => pci.notify(queue),
        }
    }

    fn offered(&self, half: u32) -> u32 {
        match self {
            Self::Mmio(mmio) => mmio.offered(half),
            Self::Pci(pci) => pci.offered(half),
        }
    }

    fn accept(&self, half: u32, features: u32) {
        match self {
            Self::Mmio(mmio) => mmio.accept(half, features),
            Self::Pci(pci) => pci.accept(half, features),
        }
    }

    fn status(&self) -> u32 {
        match self {
            Self::Mmio(mmio) => mmio.status(),
            Self::Pci(pci) => pci.status(),
        }
    }

    fn set_status(&self, status: u32) {
        match self {
            Self::Mmio(mmio) => mmio.set_status(status),
            Self::Pci(pci) => pci.set_status(status),
        }
    }

    fn config8(&self, offset: u64) -> u8 {
        match self {
            Self::Mmio(mmio) => mmio.config8(offset),
            Self::Pci(pci) => pci.config8(offset),
        }
    }

    fn config32(&self, offset: u64) -> u32 {
        match self {
            Self::Mmio(mmio) => mmio.config32(offset),
            Self::Pci(pci) => pci.config32(offset),
        }
    }
}
