//! KVM's dirty rings: one a vCPU, each a stream of hints into a set.
//!
//! Two kinds of thread empty a ring: the owner of the VM when it collects, and the vCPU itself when
//! its ring is full, since the owner may be busy for long. What a vCPU takes out goes into the
//! slot's [`OwnLog`], where the next collect finds it. It is marked *after* the
//! reset has protected the pages again: a mark seen before would let the owner copy a page that
//! another vCPU can still write unseen.
//!
//! KVM keeps a reserve in each ring and stops the vCPU before it is used up. What it emulates itself
//! without leaving the kernel (here: all of ring 0) can write past that reserve and even over
//! entries that nobody has seen. That is found, and is an error: dirty pages were lost.

use std::io;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use colo_proto::id::{PageRun, Slot};
use colo_proto::ram::PageSet;
use vm_memory::MmapRegion;
use vm_memory::bitmap::Bitmap;

use super::OwnLog;
use crate::memory::{Backing, Memory, PAGE_SIZE};
use crate::sys::{self, Ring};

/// All rings of a VM.
#[derive(Debug)]
pub(crate) struct Rings {
    vm: OwnedFd,
    rings: Vec<Mutex<Taken>>,
    maps: Vec<(Slot, Arc<MmapRegion<OwnLog>>)>,
}

#[derive(Debug)]
struct Taken {
    ring: Ring,
    /// The owner has taken entries since the vCPU last did: a ring that was full may be found empty.
    collected: bool,
    /// What a vCPU took out of its full ring, until it is marked; kept for its memory.
    pages: Vec<(Slot, u64)>,
}

impl Rings {
    pub(super) fn new<'a>(
        vm: OwnedFd,
        memory: &Memory,
        vcpus: impl Iterator<Item = &'a (impl AsRawFd + 'a)>,
        entries: u32,
    ) -> io::Result<Self> {
        let rings = vcpus
            .map(|vcpu| {
                Ok(Mutex::new(Taken {
                    ring: Ring::new(vcpu, entries)?,
                    collected: false,
                    pages: Vec::with_capacity(entries as usize),
                }))
            })
            .collect::<io::Result<_>>()?;
        let maps = memory
            .slots()
            .iter()
            .filter_map(|entry| match &entry.backing {
                Backing::Ram { map, .. } => Some((entry.slot, map.clone())),
                Backing::Store(_) => None,
            })
            .collect();
        Ok(Self { vm, rings, maps })
    }

    /// Moves what the rings hold into `into` and protects it again. The reset comes before anyone
    /// reads the pages, so it is right with the guest running too.
    pub(super) fn collect(&self, into: &mut PageSet) -> io::Result<()> {
        let mut count = 0;
        for taken in &self.rings {
            let mut taken = taken.lock().unwrap_or_else(PoisonError::into_inner);
            let harvested = taken.ring.harvest(|slot, page| {
                // False only for a page outside the slots, which KVM does not report.
                let _known = into.insert(PageRun {
                    slot: slot_of(slot),
                    first: page,
                    pages: NonZeroU32::MIN,
                });
            });
            taken.ring.overflowed(harvested)?;
            taken.collected |= harvested > 0;
            count += harvested;
        }
        if count > 0 {
            sys::reset_dirty_rings(self.vm.as_fd())?;
        }
        Ok(())
    }

    /// Called by a vCPU whose ring is full.
    pub(crate) fn relieve(&self, vcpu: usize) -> io::Result<()> {
        let Some(taken) = self.rings.get(vcpu) else {
            return Ok(());
        };
        let mut taken = taken.lock().unwrap_or_else(PoisonError::into_inner);
        let Taken {
            ring,
            collected,
            pages,
        } = &mut *taken;
        let harvested = ring.harvest(|slot, page| pages.push((slot_of(slot), page)));
        ring.overflowed(harvested)?;
        if !std::mem::take(collected) && harvested == 0 {
            return Err(sys::overflow());
        }
        sys::reset_dirty_rings(self.vm.as_fd())?;
        for (slot, page) in pages.drain(..) {
            let map = self.maps.iter().find(|(s, _)| *s == slot);
            let offset = usize::try_from(page)
                .ok()
                .and_then(|p| p.checked_mul(PAGE_SIZE));
            if let (Some((_, map)), Some(offset)) = (map, offset) {
                map.bitmap().mark_dirty(offset, PAGE_SIZE);
            }
        }
        Ok(())
    }
}

/// The upper half is the address space (SMM), which a VM without SMM does not have.
fn slot_of(raw: u32) -> Slot {
    Slot(u16::try_from(raw & 0xffff).unwrap_or(u16::MAX))
}
