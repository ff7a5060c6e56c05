//! The bus behind the host bridge: which function answers which configuration access, and where its BAR lies.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::HOST_BRIDGE;
use super::registers::{Identity, Registers};
use crate::device::codec::{Decoder, Encoder};
use crate::device::{Bus, BusDevice, LoadError, Persist};

/// Most functions behind the bridge: one in each device but the bridge itself.
pub const MOST_FUNCTIONS: usize = 31;

const VERSION: u16 = 1;
/// Registers with which firmware opens the memory below 1 MiB for writing. That is RAM here anyway.
const SHADOW: (usize, [u8; 7]) = (0x59, [0xff; 7]);
const SMRAM: usize = 0x72;

/// A function on the bus. As a [`BusDevice`] it answers the addresses of its BAR.
pub trait Function: BusDevice + Persist {
    /// Fills `data` with configuration registers from `at` on.
    fn read_config(&mut self, at: usize, data: &mut [u8]);
    /// Takes what the guest wrote there.
    fn write_config(&mut self, at: usize, data: &[u8]);
    /// Places the BAR before the guest runs.
    fn place(&mut self, base: u64);
    /// Bytes of its BAR, a power of two.
    fn bar_len(&self) -> u64;
    /// The addresses it decodes now.
    fn memory(&self) -> Option<Range<u64>>;
}

/// A place in a BAR where a write only wakes somebody.
#[derive(Debug)]
pub struct Doorbell {
    /// From the start of the BAR.
    pub offset: u64,
    /// Who is woken.
    pub fd: EventFd,
}

/// Lets writes to an address signal an eventfd without an exit.
pub trait Doorbells: Send + Sync + std::fmt::Debug {
    /// From now on a write to `addr` signals `fd`.
    fn ring_at(&self, fd: &EventFd, addr: u64);
    /// No longer.
    fn silence(&self, fd: &EventFd, addr: u64);
}

struct Slot {
    function: Arc<Mutex<dyn Function>>,
    /// The same, for the bus.
    memory: Arc<Mutex<dyn BusDevice>>,
    doorbell: Option<Doorbell>,
    mapped: Option<Range<u64>>,
}

/// The host bridge and what is behind it: function `n` is device `n + 1` of bus 0.
pub struct PciRoot {
    bridge: Registers,
    slots: Vec<Slot>,
    /// What was written to 0xcf8.
    address: u32,
    bus: Arc<Bus>,
    doorbells: Arc<dyn Doorbells>,
    /// Where the next BAR is placed.
    next: u64,
}

impl std::fmt::Debug for PciRoot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mapped = self.slots.iter().map(|slot| &slot.mapped);
        f.debug_list().entries(mapped).finish()
    }
}

impl PciRoot {
    /// A bridge with nothing behind it, whose functions are to answer on `bus`.
    #[must_use]
    pub fn new(bus: Arc<Bus>, doorbells: Arc<dyn Doorbells>) -> Self {
        // What firmware and kernels take for the bridge of a plain PC.
        let mut bridge = Registers::new(Identity {
            vendor: 0x8086,
            device: 0x1237,
            class: [6, 0, 0],
            subsystem: 0x1100,
        });
        bridge.allow(SHADOW.0, &SHADOW.1);
        bridge.allow(SMRAM, &[0xff]);
        Self {
            bridge,
            slots: Vec::new(),
            address: 0,
            bus,
            doorbells,
            next: HOST_BRIDGE.memory.start,
        }
    }

    /// Puts a function behind the bridge and places its BAR. Returns its device number, or `None` when all are taken.
    pub fn insert<F: Function + 'static>(
        &mut self,
        function: Arc<Mutex<F>>,
        doorbell: Option<Doorbell>,
    ) -> Option<usize> {
        if self.slots.len() == MOST_FUNCTIONS {
            return None;
        }
        let mut locked = function.lock().unwrap_or_else(PoisonError::into_inner);
        let len = locked.bar_len();
        let base = self.next.next_multiple_of(len);
        locked.place(base);
        drop(locked);
        self.next = base + len;
        self.slots.push(Slot {
            memory: function.clone(),
            function,
            doorbell,
            mapped: None,
        });
        Some(self.slots.len())
    }

    fn read_config(&self, device: usize, at: usize, data: &mut [u8]) {
        if device == 0 {
            self.bridge.read(at, data);
        } else if let Some(slot) = self.slots.get(device - 1) {
            slot.lock().read_config(at, data);
        }
    }

    fn write_config(&mut self, device: usize, at: usize, data: &[u8]) {
        if device == 0 {
            self.bridge.write(at, data);
        } else if let Some(slot) = self.slots.get(device - 1) {
            let mut function = slot.lock();
            function.write_config(at, data);
            let moved = function.memory() != slot.mapped;
            drop(function);
            if moved {
                self.remap();
            }
        }
    }

    /// Lets every function answer where its BAR is now. Of two that lie over each other, or over a device of the
    /// machine, only the first answers: the guest that put them there hurts itself.
    fn remap(&mut self) {
        let wanted: Vec<_> = self
            .slots
            .iter()
            .map(|slot| slot.lock().memory().map(|at| (at, slot.memory.clone())))
            .collect();
        let got = self.bus.move_to(&wanted);
        for (slot, range) in self.slots.iter_mut().zip(got) {
            if slot.mapped == range {
                continue;
            }
            let old = std::mem::replace(&mut slot.mapped, range);
            if let Some(Doorbell { offset, fd }) = &slot.doorbell {
                if let Some(old) = old {
                    self.doorbells.silence(fd, old.start + offset);
                }
                if let Some(new) = &slot.mapped {
                    self.doorbells.ring_at(fd, new.start + offset);
                }
            }
        }
    }
}

impl Slot {
    fn lock(&self) -> std::sync::MutexGuard<'_, dyn Function + 'static> {
        self.function.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Configuration space as memory: 4 KiB for each function.
#[derive(Debug)]
pub struct Ecam(pub Arc<Mutex<PciRoot>>);

impl BusDevice for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some((device, at)) = target(offset, 12, data.len()) {
            lock(&self.0).read_config(device, at, data);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some((device, at)) = target(offset, 12, data.len()) {
            lock(&self.0).write_config(device, at, data);
        }
    }
}

/// Configuration space through an address port (0xcf8) and a data port (0xcfc).
#[derive(Debug)]
pub struct ConfigPorts(pub Arc<Mutex<PciRoot>>);

impl ConfigPorts {
    /// The address port; the data port follows.
    pub const BASE: u16 = 0xcf8;
    /// Ports of both.
    pub const LEN: u16 = 8;
    const DATA: u64 = 4;
    const ENABLE: u32 = 1 << 31;

    fn selected(root: &PciRoot, offset: u64, len: usize) -> Option<(usize, usize)> {
        let address = root.address;
        let within = offset.checked_sub(Self::DATA)?;
        if address & Self::ENABLE == 0 || within + len as u64 > 4 {
            return None;
        }
        target(u64::from(address & 0x00ff_fffc) + within, 8, len)
    }
}

impl BusDevice for ConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let root = lock(&self.0);
        if let (0, Ok(data)) = (offset, <&mut [u8; 4]>::try_from(&mut *data)) {
            *data = root.address.to_le_bytes();
        } else if let Some((device, at)) = Self::selected(&root, offset, data.len()) {
            root.read_config(device, at, data);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut root = lock(&self.0);
        if let (0, Ok(data)) = (offset, data.try_into()) {
            root.address = u32::from_le_bytes(data);
        } else if let Some((device, at)) = Self::selected(&root, offset, data.len()) {
            root.write_config(device, at, data);
        }
    }
}

/// Device and register of an access, when it is one on bus 0, function 0, that stays within the function.
fn target(offset: u64, function_bits: u32, len: usize) -> Option<(usize, usize)> {
    let function = offset >> function_bits;
    let at = offset & ((1 << function_bits) - 1);
    let inside = at + len as u64 <= 1 << function_bits;
    let device = function >> 3;
    (inside && function & 7 == 0 && device < 32).then_some((device as usize, at as usize))
}

fn lock(root: &Mutex<PciRoot>) -> std::sync::MutexGuard<'_, PciRoot> {
    root.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Persist for PciRoot {
    fn section(&self) -> &str {
        "pci"
    }

    fn version(&self) -> u16 {
        VERSION
    }

    fn quiesce(&mut self) {}

    fn save(&self, out: &mut Vec<u8>) {
        let mut encoder = Encoder::new("pci", VERSION, out);
        encoder.u32(self.address);
        self.bridge.save(&mut encoder);
        encoder.seal();
    }

    fn check(&self, version: u16, bytes: &[u8]) -> Result<(), LoadError> {
        self.decode(version, bytes).map(drop)
    }

    fn load(&mut self, version: u16, bytes: &[u8]) -> Result<(), LoadError> {
        (self.address, self.bridge) = self.decode(version, bytes)?;
        Ok(())
    }

    /// All functions are loaded: their BARs may lie elsewhere now.
    fn resume(&mut self) {
        self.remap();
    }
}

impl PciRoot {
    fn decode(&self, version: u16, bytes: &[u8]) -> Result<(u32, Registers), LoadError> {
        let mut decoder = Decoder::open("pci", VERSION, version, bytes)?;
        let address = decoder.u32("configuration address")?;
        let bridge = self.bridge.decode(&mut decoder)?;
        decoder.end()?;
        Ok((address, bridge))
    }
}

/// The bridge itself has no addresses: it is reached through [`Ecam`] and [`ConfigPorts`].
impl BusDevice for PciRoot {
    fn read(&mut self, _: u64, _: &mut [u8]) {}

    fn write(&mut self, _: u64, _: &[u8]) {}
}
