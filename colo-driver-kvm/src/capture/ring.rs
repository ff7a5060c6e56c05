//! KVM's dirty rings: one a vCPU, each a stream of hints into a set.
//!
//! Two kinds of thread empty a ring: the owner of the VM when it collects, and the vCPU itself when
//! its ring is full, since the owner may be busy for long. What a vCPU takes out goes into an
//! [`OwnLog`] of the slot, where the next collect finds it. It is marked *after* the
//! reset has protected the pages again: a mark seen before would let the owner copy a page that
//! another vCPU can still write unseen.
//!
//! KVM keeps a reserve in each ring and stops the vCPU before it is used up. What it emulates itself
//! without leaving the kernel (here: all of ring 0) can write past that reserve and even over
//! entries that nobody has seen. That is found, and is an error: dirty pages were lost.

use std::io;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use colo_proto::id::{PageRun, Slot};
use colo_proto::ram::PageSet;

use super::log::duplicate;
use super::sys::{self, Ring};
use super::{OwnLog, PAGE_SIZE};

/// All rings of a VM.
#[derive(Debug)]
pub struct Rings {
    vm: OwnedFd,
    rings: Vec<Mutex<Taken>>,
    /// What vCPUs took out of full rings.
    relieved: Vec<(Slot, OwnLog)>,
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
    /// The rings of the VM with this descriptor, of `entries` entries each as they were enabled
    /// with, over slots of these sizes in pages.
    ///
    /// # Errors
    /// Rings are not enabled, or no descriptor is left.
    pub fn new<'a>(
        vm: &impl AsRawFd,
        slots: &[(Slot, u64)],
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
        let relieved = slots
            .iter()
            .map(|&(slot, pages)| (slot, OwnLog::with_pages(pages)))
            .collect();
        Ok(Self {
            vm: duplicate(vm)?,
            rings,
            relieved,
        })
    }

    /// Moves what the rings hold into `into` and protects it again. The reset comes before anyone
    /// reads the pages, so it is right with the guest running too. Then take
    /// [`relieved`](Self::relieved).
    ///
    /// # Errors
    /// KVM refused, or a ring ran over: dirty pages were lost.
    pub fn collect(&self, into: &mut PageSet) -> io::Result<()> {
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

    /// What vCPUs took out of the slot's full rings, into `words` (OR).
    pub fn relieved(&self, slot: Slot, words: &mut [u64]) {
        if let Some((_, log)) = self.relieved.iter().find(|(s, _)| *s == slot) {
            log.take(words);
        }
    }

    /// Called by a vCPU whose ring is full (`KVM_EXIT_DIRTY_RING_FULL`).
    ///
    /// # Errors
    /// As [`collect`](Self::collect).
    pub fn relieve(&self, vcpu: usize) -> io::Result<()> {
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
            let log = self.relieved.iter().find(|(s, _)| *s == slot);
            let offset = usize::try_from(page)
                .ok()
                .and_then(|p| p.checked_mul(PAGE_SIZE));
            if let (Some((_, log)), Some(offset)) = (log, offset) {
                log.mark(offset, PAGE_SIZE);
            }
        }
        Ok(())
    }
}

/// The upper half is the address space (SMM), which a VM without SMM does not have.
fn slot_of(raw: u32) -> Slot {
    Slot(u16::try_from(raw & 0xffff).unwrap_or(u16::MAX))
}
