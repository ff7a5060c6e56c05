//! Which device answers which address: one [`Bus`] for ports, one for MMIO.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// Something that answers reads and writes in an address range.
///
/// Called from vCPU threads, under the device's lock. The guest chooses `offset` (below the length registered) and the
/// width (`data.len()`), so both are untrusted: a device ignores what it does not understand, and never panics.
pub trait BusDevice: Send {
    /// Fills `data` with what the guest reads at `offset`; bytes left alone read as all ones.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes what the guest wrote at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Why a device cannot be put on the bus.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BusError {
    /// The range has no address in it, or runs past the end of the address space.
    #[error("range of {len:#x} bytes at {base:#x} is empty or wraps around")]
    BadRange {
        /// First address asked for.
        base: u64,
        /// Bytes asked for.
        len: u64,
    },
    /// Another device already answers there.
    #[error("range {wanted:#x?} overlaps a device at {taken:#x?}")]
    Overlap {
        /// The range asked for.
        wanted: Range<u64>,
        /// The range of the device that is there.
        taken: Range<u64>,
    },
}

/// An address space: sorted, disjoint ranges, each with its device. Devices stay where they were put, but for those
/// that the guest [moves](Self::move_to).
#[derive(Default)]
pub struct Bus {
    slots: RwLock<Vec<Slot>>,
}

#[derive(Clone)]
struct Slot {
    range: Range<u64>,
    device: Arc<Mutex<dyn BusDevice>>,
    /// The guest put it there.
    moves: bool,
}

impl Bus {
    /// An address space in which nobody answers.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `device` answer `len` addresses from `base` on.
    ///
    /// # Errors
    ///
    /// [`BusError`] when the range is empty, wraps, or touches one that is taken; the bus is unchanged then.
    pub fn insert(
        &self,
        base: u64,
        len: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), BusError> {
        let bad = BusError::BadRange { base, len };
        if len == 0 {
            return Err(bad);
        }
        let range = base..base.checked_add(len).ok_or(bad)?;
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let slot = Slot {
            range,
            device,
            moves: false,
        };
        claim(&mut slots, slot)
    }

    /// Puts devices where the guest wants them, instead of all that it put anywhere before. Returns where each is now:
    /// one that would lie over another stays out.
    #[expect(clippy::type_complexity, reason = "a range and a device, or neither")]
    pub fn move_to(
        &self,
        wanted: &[Option<(Range<u64>, Arc<Mutex<dyn BusDevice>>)>],
    ) -> Vec<Option<Range<u64>>> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        slots.retain(|slot| !slot.moves);
        let each = wanted.iter().map(|wanted| {
            let (range, device) = wanted.clone()?;
            let slot = Slot {
                range: range.clone(),
                device,
                moves: true,
            };
            claim(&mut slots, slot).ok().map(|()| range)
        });
        each.collect()
    }

    /// Reads at `addr`. An address nobody claims, or an access that runs out of its device, reads as all ones.
    ///
    /// Returns whether a device answered.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        let Some((device, offset)) = self.find(addr, data.len()) else {
            return false;
        };
        // A poisoned lock means a device broke its promise not to panic; its guest can still run on.
        device
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .read(offset, data);
        true
    }

    /// Writes at `addr`; a write that nobody claims goes nowhere. Returns whether a device answered.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        let Some((device, offset)) = self.find(addr, data.len()) else {
            return false;
        };
        device
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(offset, data);
        true
    }

    /// The device at an address. The bus is free again when this returns: the device may move while it answers.
    fn find(&self, addr: u64, len: usize) -> Option<(Arc<Mutex<dyn BusDevice>>, u64)> {
        let end = addr.checked_add(u64::try_from(len).ok()?)?;
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let at = slots.partition_point(|slot| slot.range.end <= addr);
        let slot = slots.get(at)?;
        let inside = slot.range.start <= addr && end <= slot.range.end;
        inside.then(|| (slot.device.clone(), addr - slot.range.start))
    }
}

fn claim(slots: &mut Vec<Slot>, slot: Slot) -> Result<(), BusError> {
    let at = slots.partition_point(|other| other.range.end <= slot.range.start);
    if let Some(other) = slots.get(at)
        && other.range.start < slot.range.end
    {
        return Err(BusError::Overlap {
            wanted: slot.range,
            taken: other.range.clone(),
        });
    }
    slots.insert(at, slot);
    Ok(())
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        f.debug_list()
            .entries(slots.iter().map(|slot| &slot.range))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers every read with its offset, remembers the last write.
    #[derive(Default)]
    struct Probe(Option<(u64, Vec<u8>)>);

    impl BusDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data[0] = u8::try_from(offset).unwrap();
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0 = Some((offset, data.to_vec()));
        }
    }

    fn probe() -> Arc<Mutex<Probe>> {
        Arc::new(Mutex::new(Probe::default()))
    }

    #[test]
    fn a_device_sees_offsets_from_its_base() {
        let (low, high) = (probe(), probe());
        let bus = Bus::new();
        bus.insert(0x1000, 0x10, high.clone()).unwrap();
        bus.insert(0x100, 0x10, low.clone()).unwrap();
        let mut data = [0];
        assert!(bus.read(0x10f, &mut data));
        assert_eq!(data, [0xf]);
        assert!(bus.write(0x1002, &[1, 2]));
        assert_eq!(high.lock().unwrap().0, Some((2, vec![1, 2])));
        assert_eq!(low.lock().unwrap().0, None);
    }

    #[test]
    fn what_nobody_claims_reads_all_ones() {
        let bus = Bus::new();
        bus.insert(0x100, 0x10, probe()).unwrap();
        for addr in [0xff, 0x110, 0x10e, u64::MAX] {
            let mut data = [0; 4];
            assert!(!bus.read(addr, &mut data), "{addr:#x}");
            assert_eq!(data, [0xff; 4]);
            assert!(!bus.write(addr, &data));
        }
    }

    #[test]
    fn overlap_is_refused_and_neighbours_are_not() {
        let bus = Bus::new();
        bus.insert(0x100, 0x10, probe()).unwrap();
        for (base, len) in [
            (0x100, 0x10),
            (0xff, 2),
            (0x10f, 1),
            (0x0, 0x1000),
            (0x104, 2),
        ] {
            let error = bus.insert(base, len, probe()).unwrap_err();
            assert!(
                matches!(error, BusError::Overlap { .. }),
                "{base:#x}: {error}"
            );
        }
        bus.insert(0xf0, 0x10, probe()).unwrap();
        bus.insert(0x110, 0x10, probe()).unwrap();
        assert_eq!(format!("{bus:?}"), "[240..256, 256..272, 272..288]");
    }

    #[test]
    fn empty_and_wrapping_ranges_are_refused() {
        let bus = Bus::new();
        for (base, len) in [(0x100, 0), (u64::MAX, 2)] {
            assert_eq!(
                bus.insert(base, len, probe()),
                Err(BusError::BadRange { base, len })
            );
        }
    }

    #[test]
    fn devices_that_move_stay_off_those_that_do_not_and_off_each_other() {
        let bus = Bus::new();
        bus.insert(0x100, 0x10, probe()).unwrap();
        let at = |start: u64, len: u64| {
            let device: Arc<Mutex<dyn BusDevice>> = probe();
            Some((start..start + len, device))
        };
        let got = bus.move_to(&[at(0x200, 0x10), None, at(0x208, 0x10), at(0xf8, 0x10)]);
        assert_eq!(got, [Some(0x200..0x210), None, None, None]);
        assert!(bus.write(0x200, &[1]));
        let got = bus.move_to(&[at(0x208, 0x10), at(0x200, 8)]);
        assert_eq!(got, [Some(0x208..0x218), Some(0x200..0x208)]);
        assert!(bus.write(0x100, &[1]), "this one stays");
    }
}
