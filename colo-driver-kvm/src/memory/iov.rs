//! Raw memory: stretches that can be copied, and page runs as I/O vectors. The `unsafe` of the
//! memory path lives here and in `staging.rs`.
//!
//! Guest RAM is written by the guest's processors while we read it. No reference to it is ever
//! formed: contents move by raw copies. A copy made while the guest runs can be torn; the page is
//! dirty again then, and copied again after the stop.

use std::marker::PhantomData;
use std::ptr::NonNull;

use colo_proto::id::PageRuns;
use vm_memory::MmapRegion;

use super::regions::{Memory, MemoryError};
use super::{PAGE_SHIFT, PAGE_SIZE};
use crate::dirty::OwnLog;

/// A stretch of mapped memory that lives as long as `'a`: whole pages, readable and writable.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span<'a> {
    at: NonNull<u8>,
    len: usize,
    alive: PhantomData<&'a ()>,
}

// SAFETY: an address range whose mapping outlives 'a, accessed by raw copies only.
unsafe impl Send for Span<'_> {}

impl<'a> Span<'a> {
    /// # Safety
    ///
    /// `at..at + len` stays mapped readable and writable for `'a`.
    pub(crate) unsafe fn new(at: NonNull<u8>, len: usize) -> Self {
        Self {
            at,
            len,
            alive: PhantomData,
        }
    }

    /// A buffer of ours.
    pub(crate) fn of(buffer: &'a mut [u8]) -> Self {
        let len = buffer.len();
        let at = NonNull::from(buffer).cast();
        // SAFETY: borrowed mutably for 'a.
        unsafe { Self::new(at, len) }
    }

    /// A part of a RAM mapping, if it has one there.
    pub(crate) fn within(map: &'a MmapRegion<OwnLog>, offset: usize, len: usize) -> Option<Self> {
        if offset.checked_add(len)? > map.size() {
            return None;
        }
        let at = NonNull::new(map.as_ptr().wrapping_add(offset))?;
        // SAFETY: checked to lie within the mapping, which 'a keeps alive.
        Some(unsafe { Self::new(at, len) })
    }

    /// Length in pages.
    pub(crate) fn pages(self) -> u32 {
        u32::try_from(self.len >> PAGE_SHIFT).unwrap_or(u32::MAX)
    }

    /// Copies to `to`, which is as long and does not overlap.
    pub(crate) fn copy_to(self, to: Span<'_>) {
        debug_assert_eq!(self.len, to.len);
        let len = self.len.min(to.len);
        // SAFETY: both ranges are mapped (the promise of `new`); guest RAM and staging are
        // different mappings, so they do not overlap. The guest may write the source meanwhile:
        // any bytes are good, see the head of this file.
        unsafe { std::ptr::copy_nonoverlapping(self.at.as_ptr(), to.at.as_ptr(), len) };
    }

    /// The same memory as a slice.
    ///
    /// # Safety
    ///
    /// It is not guest RAM, and nobody writes it for `'a`.
    pub(crate) unsafe fn bytes(self) -> &'a [u8] {
        // SAFETY: mapped (the promise of `new`), and the caller's promise.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.len) }
    }

    /// The same memory as a slice to write.
    ///
    /// # Safety
    ///
    /// It is not guest RAM, and nobody else touches it for `'a`.
    pub(crate) unsafe fn bytes_mut(self) -> &'a mut [u8] {
        // SAFETY: mapped (the promise of `new`), and the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.len) }
    }

    /// Makes the memory zero and gives it back to the host.
    pub(crate) fn discard(self) {
        // SAFETY: mapped privately and anonymously (guest RAM), so that what is gone reads as zero;
        // KVM follows by itself.
        let code = unsafe { libc::madvise(self.at.as_ptr().cast(), self.len, libc::MADV_DONTNEED) };
        debug_assert_eq!(code, 0);
    }

    /// The same memory for `readv` and `writev`.
    pub(crate) fn iovec(self) -> libc::iovec {
        libc::iovec {
            iov_base: self.at.as_ptr().cast(),
            iov_len: self.len,
        }
    }
}

impl Memory {
    /// Appends the guest RAM or the mapped disk image behind `runs` to `out`, one vector a run, for
    /// a live send or for a receive straight into place.
    ///
    /// The vectors hold good as long as this `Memory` or a clone lives. Bytes received through them
    /// are not marked dirty. Give the kernel at most 1,024 vectors a call (`IOV_MAX`).
    ///
    /// # Errors
    ///
    /// A run outside its slot, or of a disk that is not mapped; `out` is as it was.
    pub fn iovecs(&self, runs: &PageRuns, out: &mut Vec<libc::iovec>) -> Result<(), MemoryError> {
        let before = out.len();
        for run in runs {
            let found = self
                .slot_of(run)
                .and_then(|slot| slot.span(run.first, run.pages.get()));
            match found {
                Ok(span) => out.push(span.iovec()),
                Err(error) => {
                    out.truncate(before);
                    return Err(error);
                }
            }
        }
        Ok(())
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
