//! Pages *we* wrote: devices running in this process, not the guest.
//!
//! KVM logs what the guest's processors write. A device that copies a frame into guest RAM writes
//! through the host mapping, which KVM cannot see. vm-memory tells its bitmap about every such
//! write, and this is that bitmap, in KVM's own shape (64 pages a word, page 0 in bit 0 of word 0),
//! so that joining both logs is an OR.
//!
//! Anyone who writes guest RAM through a raw pointer (readv into a ring's buffers, for example)
//! must call [`OwnLog::mark`] *after* the bytes are in place: marked
//! too early, a live collect could take the mark and copy the page before the bytes arrive.

use std::sync::atomic::{AtomicU64, Ordering};

use super::PAGE_SHIFT;

/// A bitmap of pages that somebody in this process wrote.
pub trait TakeMarks {
    /// Moves all marks into `into` (OR, 64 pages a word as in KVM) and forgets them. The pages are
    /// read after this call.
    fn take_marks(&self, into: &mut [u64]);
}

/// The bitmap vm-memory marks on every write through it; one per RAM region.
#[derive(Debug, Default)]
pub struct OwnLog {
    words: Vec<AtomicU64>,
}

impl OwnLog {
    /// A log over `pages` pages, none of them marked.
    #[must_use]
    pub fn with_pages(pages: u64) -> Self {
        let words = (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { words }
    }

    /// Marks the pages of `len` bytes from `offset` on; outside of the log is ignored.
    pub fn mark(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let first = offset >> PAGE_SHIFT;
        let last = offset.saturating_add(len - 1) >> PAGE_SHIFT;
        for page in first..=last {
            let Some(word) = self.words.get(page / 64) else {
                return;
            };
            word.fetch_or(1 << (page % 64), Ordering::Release);
        }
    }

    /// Moves all marks into `into` (OR) and forgets them. No allocation.
    ///
    /// The pages must be read after this call: a device that writes concurrently either marks
    /// after its write (and the mark is seen next time) or has marked before (and the bytes are
    /// there).
    pub fn take(&self, into: &mut [u64]) {
        for (word, out) in self.words.iter().zip(into) {
            // Most words are zero; a load does not steal the cache line from a writing device.
            if word.load(Ordering::Relaxed) != 0 {
                *out |= word.swap(0, Ordering::AcqRel);
            }
        }
    }

    /// Forgets all marks.
    pub fn clear(&self) {
        for word in &self.words {
            word.store(0, Ordering::Release);
        }
    }
}

impl TakeMarks for OwnLog {
    fn take_marks(&self, into: &mut [u64]) {
        self.take(into);
    }
}

impl<T: TakeMarks + ?Sized> TakeMarks for std::sync::Arc<T> {
    fn take_marks(&self, into: &mut [u64]) {
        (**self).take_marks(into);
    }
}

#[cfg(feature = "vm-memory")]
mod vm_memory_bitmap {
    use std::sync::atomic::Ordering;

    use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

    use super::{OwnLog, PAGE_SHIFT, TakeMarks};
    use crate::capture::PAGE_SIZE;

    impl<'a> WithBitmapSlice<'a> for OwnLog {
        type S = RefSlice<'a, Self>;
    }

    impl Bitmap for OwnLog {
        fn mark_dirty(&self, offset: usize, len: usize) {
            self.mark(offset, len);
        }

        fn dirty_at(&self, offset: usize) -> bool {
            let page = offset >> PAGE_SHIFT;
            self.words
                .get(page / 64)
                .is_some_and(|word| word.load(Ordering::Acquire) & (1 << (page % 64)) != 0)
        }

        fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
            RefSlice::new(self, offset)
        }
    }

    impl NewBitmap for OwnLog {
        fn with_len(len: usize) -> Self {
            Self::with_pages(len.div_ceil(PAGE_SIZE) as u64)
        }
    }

    /// The bitmap that comes with vm-memory. It is read with an allocation a call; a VMM that
    /// chooses its bitmap is better off with [`OwnLog`].
    impl TakeMarks for AtomicBitmap {
        fn take_marks(&self, into: &mut [u64]) {
            for (marks, out) in self.get_and_reset().into_iter().zip(into) {
                *out |= marks;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "vm-memory")]
    #[test]
    fn vm_memorys_own_bitmap_is_taken_too() {
        use vm_memory::bitmap::{AtomicBitmap, Bitmap as _, NewBitmap as _};

        let bitmap = AtomicBitmap::with_len(200 << PAGE_SHIFT);
        bitmap.mark_dirty(65 << PAGE_SHIFT, 1);
        let mut words = [1, 0, 0, 0];
        bitmap.take_marks(&mut words);
        bitmap.take_marks(&mut words);
        assert_eq!(words, [1, 0b10, 0, 0]);
        assert!(!bitmap.dirty_at(65 << PAGE_SHIFT));
    }

    #[test]
    fn a_write_across_a_page_boundary_marks_both_pages() {
        let log = OwnLog::with_pages(200);
        log.mark((64 << PAGE_SHIFT) - 1, 2);
        let mut words = [0; 4];
        log.take(&mut words);
        assert_eq!(words, [1 << 63, 1, 0, 0]);
    }

    #[test]
    fn taking_forgets_and_joins() {
        let log = OwnLog::with_pages(64);
        log.mark(0, 1);
        let mut words = [0b10];
        log.take(&mut words);
        log.take(&mut words);
        assert_eq!(words, [0b11]);
        let mut words = [0];
        log.take(&mut words);
        assert_eq!(words, [0]);
    }

    #[test]
    fn a_mark_outside_is_ignored() {
        let log = OwnLog::with_pages(1);
        log.mark(usize::MAX - 1, 8);
        let mut words = [0];
        log.take(&mut words);
        assert_eq!(words, [0]);
    }
}
