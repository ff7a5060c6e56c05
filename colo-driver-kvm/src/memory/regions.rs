//! The slot table: what lies behind each slot that a checkpoint covers.
//!
//! A slot is a numbered row of pages. Behind it is guest RAM, known to KVM under the same number,
//! or a [`PageStore`]: a disk's file, whose device keeps the dirty bitmap. The core sees no
//! difference; here RAM is memory to point at, a store is asked to move pages.

use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use colo_proto::id::{PageRun, PageRuns, Slot};
use vm_memory::{GuestAddress, GuestMemoryBackend, MmapRegion};

use super::layout::{FIRST_STORE, Layout};
use super::{GuestRam, PAGE_SIZE};
use crate::capture::{self, MemoryError, OwnLog, Pages, Span};
use crate::device::virtio::Disk;

/// Pages that live in a file: a disk seen as a slot.
///
/// Called by the thread that owns the VM. `read_pages` and `take_dirty` also while the guest runs:
/// a page written meanwhile may come back torn, but is dirty then and read again after the stop.
pub trait PageStore: Send + Sync {
    /// Size in pages of 4096 bytes.
    fn pages(&self) -> u64;
    /// Moves the dirty marks into `into` (OR), 64 pages a word as in KVM, and forgets them. A write
    /// is marked after its bytes are in place.
    fn take_dirty(&self, into: &mut [u64]);
    /// Reads pages from `first` on, as many as `into` has room for.
    ///
    /// # Errors
    ///
    /// What the file says.
    fn read_pages(&self, first: u64, into: &mut [u8]) -> io::Result<()>;
    /// Writes pages from `first` on. Not marked dirty.
    ///
    /// # Errors
    ///
    /// What the file says.
    fn write_pages(&self, first: u64, from: &[u8]) -> io::Result<()>;
    /// The whole image as memory shared with its file, where it can be pointed at: the first
    /// synchronisation then sends and receives it without a copy of our own.
    fn map(&self) -> Option<&MmapRegion<OwnLog>> {
        None
    }
}

impl PageStore for Disk {
    fn pages(&self) -> u64 {
        Self::pages(self)
    }

    fn take_dirty(&self, into: &mut [u64]) {
        Self::take_dirty(self, into);
    }

    fn read_pages(&self, first: u64, into: &mut [u8]) -> io::Result<()> {
        Self::read_pages(self, first, into)
    }

    fn write_pages(&self, first: u64, from: &[u8]) -> io::Result<()> {
        Self::write_pages(self, first, from)
    }

    fn map(&self) -> Option<&MmapRegion<OwnLog>> {
        Self::map(self)
    }
}

#[derive(Clone)]
pub(crate) enum Backing {
    Ram {
        map: Arc<MmapRegion<OwnLog>>,
        base: u64,
    },
    Store(Arc<dyn PageStore>),
}

#[derive(Clone)]
pub(crate) struct SlotEntry {
    pub(crate) slot: Slot,
    pub(crate) pages: u64,
    pub(crate) backing: Backing,
}

/// All slots of a VM. A clone allocates nothing; the mappings live as long as any clone.
#[derive(Clone)]
pub struct Memory {
    ram: Arc<GuestRam>,
    slots: Arc<[SlotEntry]>,
}

impl Memory {
    pub(crate) fn new(layout: &Layout) -> Result<Self, MemoryError> {
        let bytes = layout.bytes();
        let failed = |source| MemoryError::Map { bytes, source };
        let mut ranges = Vec::new();
        for piece in layout.pieces() {
            let len = usize::try_from(piece.bytes())
                .map_err(|_| failed(io::ErrorKind::OutOfMemory.into()))?;
            ranges.push((GuestAddress(piece.base), len));
        }
        let ram = GuestRam::from_ranges(&ranges).map_err(|e| failed(io::Error::other(e)))?;
        let mut slots = Vec::new();
        for piece in layout.pieces() {
            let map = ram
                .find_region(GuestAddress(piece.base))
                .map(vm_memory::GuestRegionMmap::get_mmap)
                .ok_or_else(|| failed(io::ErrorKind::AddrNotAvailable.into()))?;
            slots.push(SlotEntry {
                slot: piece.slot,
                pages: piece.pages,
                backing: Backing::Ram {
                    map,
                    base: piece.base,
                },
            });
        }
        Ok(Self {
            ram: Arc::new(ram),
            slots: slots.into(),
        })
    }

    pub(crate) fn with_store(
        &self,
        slot: Slot,
        store: Arc<dyn PageStore>,
    ) -> Result<Self, MemoryError> {
        if slot.0 < FIRST_STORE || self.slots.iter().any(|s| s.slot == slot) {
            return Err(MemoryError::SlotTaken {
                slot,
                from: FIRST_STORE,
            });
        }
        let mut slots = self.slots.to_vec();
        slots.push(SlotEntry {
            slot,
            pages: store.pages(),
            backing: Backing::Store(store),
        });
        slots.sort_by_key(|s| s.slot);
        Ok(Self {
            ram: Arc::clone(&self.ram),
            slots: slots.into(),
        })
    }

    /// Guest RAM as devices see it.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Slots and their sizes in pages: the machine shape both hosts must share.
    #[must_use]
    pub fn shape(&self) -> Vec<(Slot, u64)> {
        self.slots.iter().map(|s| (s.slot, s.pages)).collect()
    }

    pub(crate) fn slots(&self) -> &[SlotEntry] {
        &self.slots
    }

    /// The slot of a run, if the run lies within it.
    pub(crate) fn slot_of(&self, run: &PageRun) -> Result<&SlotEntry, MemoryError> {
        let found = self.slots.iter().find(|s| s.slot == run.slot);
        found
            .filter(|s| run.end() <= s.pages)
            .ok_or_else(|| MemoryError::OutOfSlot {
                slot: run.slot,
                first: run.first,
                pages: run.pages.get(),
                have: found.map_or(0, |s| s.pages),
            })
    }
}

impl Memory {
    /// [`capture::iovecs`] of this memory; a disk is pointed at where its image is mapped.
    ///
    /// # Errors
    ///
    /// A run outside its slot, or of a disk that is not mapped; `out` is as it was.
    pub fn iovecs(&self, runs: &PageRuns, out: &mut Vec<libc::iovec>) -> Result<(), MemoryError> {
        capture::iovecs(self, runs, out)
    }

    fn entry(&self, slot: Slot) -> Result<&SlotEntry, MemoryError> {
        let found = self.slots.iter().find(|s| s.slot == slot);
        found.ok_or(MemoryError::OutOfSlot {
            slot,
            first: 0,
            pages: 0,
            have: 0,
        })
    }
}

impl Pages for Memory {
    fn shape(&self) -> Vec<(Slot, u64)> {
        Self::shape(self)
    }

    fn span(&self, run: &PageRun) -> Result<Span<'_>, MemoryError> {
        self.slot_of(run)?.span(run.first, run.pages.get())
    }

    fn within(&self, run: &PageRun) -> Result<(), MemoryError> {
        self.slot_of(run).map(drop)
    }

    fn read(&self, slot: Slot, first: u64, to: Span<'_>) -> Result<(), MemoryError> {
        self.entry(slot)?.read(first, to)
    }

    fn write(&self, slot: Slot, first: u64, from: Span<'_>) -> Result<(), MemoryError> {
        self.entry(slot)?.write(first, from)
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.shape()).finish()
    }
}

impl SlotEntry {
    /// The memory behind a run of pages.
    pub(crate) fn span(&self, first: u64, pages: u32) -> Result<Span<'_>, MemoryError> {
        let map = match &self.backing {
            Backing::Ram { map, .. } => map,
            Backing::Store(store) => store
                .map()
                .ok_or(MemoryError::NotMemory { slot: self.slot })?,
        };
        let offset = usize::try_from(first)
            .ok()
            .and_then(|p| p.checked_mul(PAGE_SIZE));
        offset
            .and_then(|offset| within(map, offset, pages as usize * PAGE_SIZE))
            .ok_or(MemoryError::OutOfSlot {
                slot: self.slot,
                first,
                pages,
                have: self.pages,
            })
    }

    /// Copies pages from `first` on out, as many as `to` holds. They may be torn while the guest
    /// runs.
    pub(crate) fn read(&self, first: u64, to: Span<'_>) -> Result<(), MemoryError> {
        match &self.backing {
            Backing::Ram { .. } => {
                self.span(first, to.pages())?.copy_to(to);
                Ok(())
            }
            Backing::Store(store) => {
                // SAFETY: `to` is staged memory that the caller has for itself (`Staging::claim`).
                let into = unsafe { to.bytes_mut() };
                store
                    .read_pages(first, into)
                    .map_err(|source| self.refused(first, source))
            }
        }
    }

    /// Copies pages in at `first`, as many as `from` holds. The guest is stopped. Not marked dirty.
    pub(crate) fn write(&self, first: u64, from: Span<'_>) -> Result<(), MemoryError> {
        match &self.backing {
            Backing::Ram { .. } => {
                from.copy_to(self.span(first, from.pages())?);
                Ok(())
            }
            Backing::Store(store) => {
                // SAFETY: `from` is staged memory, whole: nobody receives into it any more.
                let from = unsafe { from.bytes() };
                store
                    .write_pages(first, from)
                    .map_err(|source| self.refused(first, source))
            }
        }
    }

    /// Makes all of RAM zero; a disk is left alone.
    pub(crate) fn discard(&self) {
        if let Backing::Ram { map, .. } = &self.backing
            && let Some(all) = within(map, 0, map.size())
        {
            discard(all);
        }
    }

    pub(crate) fn is_store(&self) -> bool {
        matches!(self.backing, Backing::Store(_))
    }

    fn refused(&self, first: u64, source: io::Error) -> MemoryError {
        MemoryError::Store {
            slot: self.slot,
            first,
            source,
        }
    }
}

/// A part of a mapping, if it has one there.
fn within(map: &MmapRegion<OwnLog>, offset: usize, len: usize) -> Option<Span<'_>> {
    if offset.checked_add(len)? > map.size() {
        return None;
    }
    let at = NonNull::new(map.as_ptr().wrapping_add(offset))?;
    // SAFETY: checked to lie within the mapping, which the borrow keeps alive; guest RAM and disk
    // images are touched through raw pointers only.
    Some(unsafe { Span::new(at, len) })
}

/// Makes the memory zero and gives it back to the host.
fn discard(all: Span<'_>) {
    let (at, len) = (all.start().as_ptr(), all.bytes_len());
    // SAFETY: mapped privately and anonymously (guest RAM), so that what is gone reads as zero; KVM
    // follows by itself.
    let code = unsafe { libc::madvise(at.cast(), len, libc::MADV_DONTNEED) };
    debug_assert_eq!(code, 0);
}
