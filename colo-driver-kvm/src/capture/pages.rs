//! Raw memory: where slots lie, stretches that can be copied, page runs as I/O vectors.
//!
//! Guest RAM is written by the guest's processors while we read it. No reference to it is ever
//! formed: contents move by raw copies. A copy made while the guest runs can be torn; the page is
//! dirty again then, and copied again after the stop.

use std::io;
use std::marker::PhantomData;
use std::num::NonZeroU32;
use std::ptr::NonNull;

use colo_proto::id::{PageRun, PageRuns, Slot};

use super::{PAGE_SHIFT, PAGE_SIZE};

/// Why memory could not be made or addressed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The host has no room.
    #[error(
        "cannot map {bytes:#x} bytes of guest memory: {source}; give the guest less memory or the host more"
    )]
    Map {
        /// Bytes asked for.
        bytes: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// A run that does not lie in a slot.
    #[error("pages {first:#x}+{pages:#x} do not lie within slot {slot}, which has {have:#x} pages")]
    OutOfSlot {
        /// The slot.
        slot: Slot,
        /// First page.
        first: u64,
        /// How many.
        pages: u32,
        /// Pages of the slot, 0 if there is no such slot.
        have: u64,
    },
    /// A slot number that is taken or kept for RAM.
    #[error("slot {slot} is taken: number disks from {from} on, each once")]
    SlotTaken {
        /// The slot.
        slot: Slot,
        /// The first number that a disk may have.
        from: u16,
    },
    /// A disk's pages cannot be pointed at: it is read-only, or its image ends within a page.
    #[error(
        "slot {slot} is a disk that cannot be mapped: give it write access and a size that is a multiple of 4096"
    )]
    NotMemory {
        /// The slot.
        slot: Slot,
    },
    /// A disk's file refused.
    #[error("slot {slot}, pages from {first:#x}: {source}")]
    Store {
        /// The slot.
        slot: Slot,
        /// First page.
        first: u64,
        /// What the file said.
        source: io::Error,
    },
}

/// What lies behind the slots of a machine.
pub trait Pages {
    /// Slots and their sizes in pages: the shape that both hosts must share.
    fn shape(&self) -> Vec<(Slot, u64)>;

    /// The memory behind a run of pages.
    ///
    /// # Errors
    /// A run outside its slot, or of a slot that is not memory.
    fn span(&self, run: &PageRun) -> Result<Span<'_>, MemoryError>;

    /// Whether a run lies within its slot.
    ///
    /// # Errors
    /// [`MemoryError::OutOfSlot`].
    fn within(&self, run: &PageRun) -> Result<(), MemoryError> {
        self.span(run).map(drop)
    }

    /// Copies pages from `first` on out, as many as `to` holds. They may be torn while the guest
    /// runs.
    ///
    /// # Errors
    /// As [`span`](Self::span); a disk's file may refuse.
    fn read(&self, slot: Slot, first: u64, to: Span<'_>) -> Result<(), MemoryError> {
        if let Some(pages) = NonZeroU32::new(to.pages()) {
            self.span(&PageRun { slot, first, pages })?.copy_to(to);
        }
        Ok(())
    }

    /// Copies pages in at `first`, as many as `from` holds. The guest is stopped. Not marked dirty.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn write(&self, slot: Slot, first: u64, from: Span<'_>) -> Result<(), MemoryError> {
        if let Some(pages) = NonZeroU32::new(from.pages()) {
            from.copy_to(self.span(&PageRun { slot, first, pages })?);
        }
        Ok(())
    }
}

/// Appends the memory behind `runs` to `out`, one vector a run, for a live send or for a receive
/// straight into place. Bytes received through them are not marked dirty. Give the kernel at most
/// 1,024 vectors a call (`IOV_MAX`).
///
/// # Errors
/// As [`Pages::span`]; `out` is as it was.
pub fn iovecs(
    pages: &impl Pages,
    runs: &PageRuns,
    out: &mut Vec<libc::iovec>,
) -> Result<(), MemoryError> {
    let before = out.len();
    for run in runs {
        match pages.span(run) {
            Ok(span) => out.push(span.iovec()),
            Err(error) => {
                out.truncate(before);
                return Err(error);
            }
        }
    }
    Ok(())
}

/// Guest RAM that this process has mapped: slots, each one stretch of address space.
#[derive(Clone, Debug, Default)]
pub struct Ram {
    slots: Vec<(Slot, NonNull<u8>, u64)>,
}

// SAFETY: addresses of memory that `add` is promised to stay mapped; touched by raw copies only.
unsafe impl Send for Ram {}
// SAFETY: as above; nothing here is changed through a shared borrow.
unsafe impl Sync for Ram {}

impl Ram {
    /// No memory yet.
    #[must_use]
    pub const fn new() -> Self {
        Self { slots: Vec::new() }
    }

    /// Adds a slot of `bytes` bytes at `start`. The dirty log must know it under the same number:
    /// with KVM, that of its memory slot.
    ///
    /// # Errors
    /// [`MemoryError::OutOfSlot`] for a number that was added before or a size that is not whole
    /// pages.
    ///
    /// # Safety
    /// It stays mapped readable and writable for as long as this value, any clone of it, and
    /// whoever was given vectors into it live. Whoever touches it does so through raw pointers or
    /// atomics.
    pub unsafe fn add(
        &mut self,
        slot: Slot,
        start: NonNull<u8>,
        bytes: usize,
    ) -> Result<(), MemoryError> {
        let pages = (bytes >> PAGE_SHIFT) as u64;
        if !bytes.is_multiple_of(PAGE_SIZE) || self.slots.iter().any(|s| s.0 == slot) {
            return Err(MemoryError::OutOfSlot {
                slot,
                first: 0,
                pages: u32::try_from(pages).unwrap_or(u32::MAX),
                have: 0,
            });
        }
        self.slots.push((slot, start, pages));
        Ok(())
    }
}

impl Pages for Ram {
    fn shape(&self) -> Vec<(Slot, u64)> {
        self.slots
            .iter()
            .map(|&(slot, _, pages)| (slot, pages))
            .collect()
    }

    fn span(&self, run: &PageRun) -> Result<Span<'_>, MemoryError> {
        let found = self.slots.iter().find(|s| s.0 == run.slot);
        let offset = usize::try_from(run.first)
            .ok()
            .and_then(|page| page.checked_mul(PAGE_SIZE));
        let (&(_, start, _), offset) =
            found
                .filter(|s| run.end() <= s.2)
                .zip(offset)
                .ok_or_else(|| MemoryError::OutOfSlot {
                    slot: run.slot,
                    first: run.first,
                    pages: run.pages.get(),
                    have: found.map_or(0, |s| s.2),
                })?;
        // SAFETY: the run lies within the slot, which `add` was promised to be mapped.
        let at = unsafe { start.add(offset) };
        // SAFETY: as above, for as long as this value lives.
        Ok(unsafe { Span::new(at, bytes(run.pages.get())) })
    }
}

/// A stretch of mapped memory that lives as long as `'a`: whole pages, readable and writable.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    at: NonNull<u8>,
    len: usize,
    alive: PhantomData<&'a ()>,
}

// SAFETY: an address range whose mapping outlives 'a, accessed by raw copies only.
unsafe impl Send for Span<'_> {}

impl<'a> Span<'a> {
    /// # Safety
    ///
    /// `at..at + len` stays mapped readable and writable for `'a`, and whoever touches it does so
    /// through raw pointers or atomics.
    #[must_use]
    pub const unsafe fn new(at: NonNull<u8>, len: usize) -> Self {
        Self {
            at,
            len,
            alive: PhantomData,
        }
    }

    /// A buffer of ours.
    #[must_use]
    pub fn of(buffer: &'a mut [u8]) -> Self {
        let len = buffer.len();
        let at = NonNull::from(buffer).cast();
        // SAFETY: borrowed mutably for 'a.
        unsafe { Self::new(at, len) }
    }

    /// Where it begins.
    #[must_use]
    pub const fn start(self) -> NonNull<u8> {
        self.at
    }

    /// Length in bytes.
    #[must_use]
    pub const fn bytes_len(self) -> usize {
        self.len
    }

    /// Length in pages.
    #[must_use]
    pub fn pages(self) -> u32 {
        u32::try_from(self.len >> PAGE_SHIFT).unwrap_or(u32::MAX)
    }

    /// Copies to `to`, which is as long.
    pub fn copy_to(self, to: Span<'_>) {
        debug_assert_eq!(self.len, to.len);
        let len = self.len.min(to.len);
        // SAFETY: both ranges are mapped (the promise of `new`). The guest may write the source
        // meanwhile: any bytes are good, see the head of this file.
        unsafe { std::ptr::copy(self.at.as_ptr(), to.at.as_ptr(), len) };
    }

    /// The same memory as a slice.
    ///
    /// # Safety
    ///
    /// It is not guest RAM, and nobody writes it for `'a`.
    #[must_use]
    pub unsafe fn bytes(self) -> &'a [u8] {
        // SAFETY: mapped (the promise of `new`), and the caller's promise.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.len) }
    }

    /// The same memory as a slice to write.
    ///
    /// # Safety
    ///
    /// It is not guest RAM, and nobody else touches it for `'a`.
    #[must_use]
    pub unsafe fn bytes_mut(self) -> &'a mut [u8] {
        // SAFETY: mapped (the promise of `new`), and the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.len) }
    }

    /// The same memory for `readv` and `writev`.
    #[must_use]
    pub const fn iovec(self) -> libc::iovec {
        libc::iovec {
            iov_base: self.at.as_ptr().cast(),
            iov_len: self.len,
        }
    }
}

/// Calls `each` for every run of set bits, lowest first, as (first page, pages). Runs are at most
/// `u32::MAX` pages long.
pub(crate) fn for_each_run<E>(
    words: &[u64],
    mut each: impl FnMut(u64, u32) -> Result<(), E>,
) -> Result<(), E> {
    let mut open: Option<(u64, u32)> = None;
    for (at, &word) in words.iter().enumerate() {
        if word == 0 {
            if let Some((first, pages)) = open.take() {
                each(first, pages)?;
            }
            continue;
        }
        let mut rest = word;
        let mut base = 0;
        while base < 64 {
            let zeros = rest.trailing_zeros().min(64 - base);
            if zeros > 0 {
                if let Some((first, pages)) = open.take() {
                    each(first, pages)?;
                }
                base += zeros;
                rest = rest.checked_shr(zeros).unwrap_or(0);
                continue;
            }
            let ones = rest.trailing_ones();
            let first = at as u64 * 64 + u64::from(base);
            open = match open {
                Some((start, pages)) if pages < u32::MAX - 64 => Some((start, pages + ones)),
                Some((start, pages)) => {
                    each(start, pages)?;
                    Some((first, ones))
                }
                None => Some((first, ones)),
            };
            base += ones;
            rest = rest.checked_shr(ones).unwrap_or(0);
        }
    }
    match open {
        Some((first, pages)) => each(first, pages),
        None => Ok(()),
    }
}

/// Bytes of `pages` pages.
pub(crate) fn bytes(pages: u32) -> usize {
    pages as usize * PAGE_SIZE
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    fn runs(words: &[u64]) -> Vec<(u64, u32)> {
        let mut all = Vec::new();
        let Ok(()) = for_each_run(words, |first, pages| {
            all.push((first, pages));
            Ok::<(), Infallible>(())
        });
        all
    }

    #[test]
    fn runs_join_across_words() {
        assert_eq!(runs(&[1 << 63, u64::MAX, 0b101]), [(63, 66), (130, 1)]);
        assert_eq!(runs(&[0, u64::MAX, 0, 2]), [(64, 64), (193, 1)]);
        assert_eq!(runs(&[]), []);
    }

    proptest! {
        #[test]
        fn runs_are_exactly_the_bits(words in proptest::collection::vec(
            prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 0..8)) {
            let bits: Vec<u64> = (0..words.len() as u64 * 64)
                .filter(|p| words[*p as usize / 64] >> (p % 64) & 1 == 1)
                .collect();
            let all = runs(&words);
            let covered: Vec<u64> = all.iter().flat_map(|&(f, n)| f..f + u64::from(n)).collect();
            prop_assert_eq!(covered, bits);
            for pair in all.windows(2) {
                prop_assert!(pair[0].0 + u64::from(pair[0].1) < pair[1].0, "runs do not touch");
            }
        }
    }
}
