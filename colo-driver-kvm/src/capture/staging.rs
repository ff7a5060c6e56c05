//! The staging area: copies of the pages of one epoch, found by slot and page.
//!
//! ```text
//!   index[slot][page] ──▶ frame number + 1        4 bytes a guest page, untouched parts cost nothing
//!   frames            ──▶ one mapping, filled from the bottom, resident up to its high-water mark
//!   owner[frame]      ──▶ which page it holds, to empty the index in time of what is used
//! ```
//!
//! The primary captures into it and sends from it while the guest runs on; the secondary receives
//! into it and commits from it once the epoch is whole. A page staged twice keeps its frame, so a
//! second copy replaces the first. Pages that follow each other and are staged together get frames
//! that follow each other, so a run is usually one I/O vector.

use std::io;
use std::ptr::NonNull;

use colo_proto::id::{PageRun, PageRuns, Slot};

use super::PAGE_SIZE;
use super::pages::{self, MemoryError, Pages, Span};

/// Frames made resident ahead of their use, so that none is faulted in during a stop.
const AHEAD: usize = 512;

/// Why pages were not staged or not found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StagingError {
    /// Over the bound.
    #[error(
        "the staging area is full: {limit} pages are its bound and {more} more are needed; take checkpoints more often or raise the bound"
    )]
    Full {
        /// The bound in pages.
        limit: u32,
        /// What did not fit, at least.
        more: u32,
    },
    /// A page that is not there.
    #[error("page {page:#x} of slot {slot} is not staged")]
    Absent {
        /// The slot.
        slot: Slot,
        /// The page.
        page: u64,
    },
    /// A run outside memory, or its content could not be moved.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Page contents of one epoch, bounded and reusable.
#[derive(Debug)]
pub struct Staging {
    index: Vec<(Slot, Vec<u32>)>,
    owner: Vec<(u16, u64)>,
    pool: Pool,
    limit: u32,
    ready: usize,
}

impl Staging {
    /// An empty area over slots of the given sizes in pages, which holds at most `limit` pages.
    /// Address space is taken for all of them, memory only as they are used.
    ///
    /// # Errors
    ///
    /// No address space.
    pub fn new(shape: &[(Slot, u64)], limit: u32) -> Result<Self, MemoryError> {
        let limit = limit.clamp(1, u32::MAX - 1);
        let bytes = pages::bytes(limit);
        let pool = Pool::new(bytes).map_err(|source| MemoryError::Map {
            bytes: bytes as u64,
            source,
        })?;
        let index = shape
            .iter()
            .map(|&(slot, pages)| (slot, vec![0; usize::try_from(pages).unwrap_or(0)]))
            .collect();
        let mut staging = Self {
            index,
            owner: Vec::with_capacity(limit as usize),
            pool,
            limit,
            ready: 0,
        };
        staging.prepare();
        Ok(staging)
    }

    /// Pages held.
    #[must_use]
    pub fn pages(&self) -> u32 {
        u32::try_from(self.owner.len()).unwrap_or(u32::MAX)
    }

    /// The bound in pages.
    #[must_use]
    pub fn limit(&self) -> u32 {
        self.limit
    }

    /// Empties the area and keeps its memory.
    pub fn clear(&mut self) {
        for &(at, page) in &self.owner {
            let entry = self
                .index
                .get_mut(usize::from(at))
                .and_then(|(_, pages)| pages.get_mut(usize::try_from(page).ok()?));
            if let Some(entry) = entry {
                *entry = 0;
            }
        }
        self.owner.clear();
    }

    /// Gives memory back to the host beyond what `pages` pages need, after an unusually large epoch.
    pub fn shrink(&mut self, pages: u32) {
        let keep = pages::bytes(pages.max(self.pages()));
        self.pool.release(keep);
        self.ready = self.ready.min(keep);
    }

    /// Makes the next frames resident, outside of any stop.
    pub(crate) fn prepare(&mut self) {
        let want = (self.owner.len() + AHEAD).min(self.limit as usize) * PAGE_SIZE;
        if want > self.ready {
            self.pool.populate(self.ready, want);
            self.ready = want;
        }
    }

    /// Makes sure that every page of `runs` has a frame, to receive into.
    ///
    /// # Errors
    ///
    /// [`StagingError::Full`] over the bound, or a run outside memory. Frames given out before the
    /// error stay, to be dropped by [`clear`](Self::clear).
    pub fn reserve(&mut self, runs: &PageRuns) -> Result<(), StagingError> {
        for run in runs {
            self.claim(*run, |_, _| Ok(()))?;
        }
        self.prepare();
        Ok(())
    }

    /// Whether a page is held.
    #[must_use]
    pub fn contains(&self, slot: Slot, page: u64) -> bool {
        self.frame(slot, page).is_some()
    }

    /// Appends the staged memory of `runs` to `out`, in order, one vector for each stretch of
    /// neighbouring frames: to send what was captured, or to receive into what was
    /// [reserved](Self::reserve). Good until the next `clear`. At most 1,024 vectors a call.
    ///
    /// # Errors
    ///
    /// A page that is not held; `out` is as it was.
    pub fn iovecs(&self, runs: &PageRuns, out: &mut Vec<libc::iovec>) -> Result<(), StagingError> {
        let before = out.len();
        for run in runs {
            let pushed = self.spans(*run, |_, span| {
                out.push(span.iovec());
                Ok(())
            });
            if let Err(error) = pushed {
                out.truncate(before);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Copies a run aside.
    ///
    /// # Errors
    ///
    /// Over the bound, a run outside its slot, or a disk's file refused.
    pub fn stage(&mut self, pages: &impl Pages, run: PageRun) -> Result<(), StagingError> {
        pages.within(&run)?;
        self.claim(run, |first, span| Ok(pages.read(run.slot, first, span)?))
    }

    /// Finds or makes the frames of a run and hands them out as stretches: (first page, memory).
    pub(crate) fn claim(
        &mut self,
        run: PageRun,
        mut each: impl FnMut(u64, Span<'_>) -> Result<(), StagingError>,
    ) -> Result<(), StagingError> {
        let out = MemoryError::OutOfSlot {
            slot: run.slot,
            first: run.first,
            pages: run.pages.get(),
            have: 0,
        };
        let Some(at) = self.index.iter().position(|(slot, _)| *slot == run.slot) else {
            return Err(out.into());
        };
        let Some((_, pages)) = self.index.get_mut(at) else {
            return Err(out.into());
        };
        let range = usize::try_from(run.first)
            .ok()
            .zip(usize::try_from(run.end()).ok());
        let Some(entries) = range.and_then(|(first, end)| pages.get_mut(first..end)) else {
            return Err(out.into());
        };
        let owner_at = u16::try_from(at).unwrap_or(u16::MAX);
        let mut stretch: Option<Stretch> = None;
        for (page, entry) in (run.first..).zip(entries) {
            if *entry == 0 {
                let used = u32::try_from(self.owner.len()).unwrap_or(u32::MAX);
                if used >= self.limit {
                    let more = u32::try_from(run.end() - page).unwrap_or(u32::MAX);
                    return Err(StagingError::Full {
                        limit: self.limit,
                        more,
                    });
                }
                self.owner.push((owner_at, page));
                *entry = used + 1;
            }
            Stretch::extend(&mut stretch, page, *entry - 1, |s| {
                each(s.page, self.pool.frames(s.frame, s.len))
            })?;
        }
        match stretch {
            Some(s) => each(s.page, self.pool.frames(s.frame, s.len)),
            None => Ok(()),
        }
    }

    /// Hands out the frames of a run as stretches: (first page, memory).
    pub(crate) fn spans(
        &self,
        run: PageRun,
        mut each: impl FnMut(u64, Span<'_>) -> Result<(), StagingError>,
    ) -> Result<(), StagingError> {
        let absent = |page| StagingError::Absent {
            slot: run.slot,
            page,
        };
        let range = usize::try_from(run.first)
            .ok()
            .zip(usize::try_from(run.end()).ok());
        let entries = self
            .index
            .iter()
            .find(|(slot, _)| *slot == run.slot)
            .and_then(|(_, pages)| range.and_then(|(first, end)| pages.get(first..end)))
            .ok_or_else(|| absent(run.first))?;
        let mut stretch: Option<Stretch> = None;
        for (page, entry) in (run.first..).zip(entries) {
            let frame = entry.checked_sub(1).ok_or_else(|| absent(page))?;
            Stretch::extend(&mut stretch, page, frame, |s| {
                each(s.page, self.pool.frames(s.frame, s.len))
            })?;
        }
        match stretch {
            Some(s) => each(s.page, self.pool.frames(s.frame, s.len)),
            None => Ok(()),
        }
    }

    fn frame(&self, slot: Slot, page: u64) -> Option<u32> {
        let (_, pages) = self.index.iter().find(|(s, _)| *s == slot)?;
        pages.get(usize::try_from(page).ok()?)?.checked_sub(1)
    }
}

/// Pages that follow each other in frames that follow each other.
#[derive(Clone, Copy)]
struct Stretch {
    page: u64,
    frame: u32,
    len: u32,
}

impl Stretch {
    fn extend<E>(
        open: &mut Option<Self>,
        page: u64,
        frame: u32,
        flush: impl FnOnce(Self) -> Result<(), E>,
    ) -> Result<(), E> {
        if let Some(s) = open
            && s.frame + s.len == frame
        {
            s.len += 1;
            return Ok(());
        }
        let done = open.replace(Self {
            page,
            frame,
            len: 1,
        });
        done.map_or(Ok(()), flush)
    }
}

/// The mapping that holds the frames.
#[derive(Debug)]
struct Pool {
    at: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory that this value owns; handed out only as `Span`s that borrow from it.
unsafe impl Send for Pool {}
// SAFETY: as above; through a shared borrow it is only pointed at.
unsafe impl Sync for Pool {}

impl Pool {
    fn new(len: usize) -> io::Result<Self> {
        // SAFETY: a new private mapping at an address the kernel picks.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let pool = Self {
            at: NonNull::new(at.cast()).ok_or_else(io::Error::last_os_error)?,
            len,
        };
        // Fewer TLB misses in the copy; without huge pages it works all the same.
        pool.advise(0, len, libc::MADV_HUGEPAGE);
        Ok(pool)
    }

    fn frames(&self, first: u32, count: u32) -> Span<'_> {
        let offset = pages::bytes(first).min(self.len);
        let len = pages::bytes(count).min(self.len - offset);
        // SAFETY: `offset` is within the mapping.
        let at = unsafe { self.at.add(offset) };
        // SAFETY: within the mapping, which lives as long as the borrow of `self`.
        unsafe { Span::new(at, len) }
    }

    fn populate(&self, from: usize, to: usize) {
        self.advise(from, to, libc::MADV_POPULATE_WRITE);
    }

    fn release(&self, from: usize) {
        self.advise(from, self.len, libc::MADV_DONTNEED);
    }

    /// Advice is advice: a kernel that does not know it costs speed, nothing else.
    fn advise(&self, from: usize, to: usize, advice: libc::c_int) {
        let (from, to) = (from.min(self.len), to.min(self.len));
        if from >= to {
            return;
        }
        // SAFETY: `from` is within the mapping.
        let at = unsafe { self.at.add(from) };
        // SAFETY: within the mapping; no advice used here invalidates a span that is in use.
        unsafe { libc::madvise(at.as_ptr().cast(), to - from, advice) };
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped; spans borrow from `self` and are gone.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    fn run(slot: u16, first: u64, pages: u32) -> PageRun {
        PageRun {
            slot: Slot(slot),
            first,
            pages: NonZeroU32::new(pages).unwrap(),
        }
    }

    fn runs(all: &[PageRun]) -> PageRuns {
        let mut runs = PageRuns::new();
        for run in all {
            runs.push(*run).unwrap();
        }
        runs
    }

    fn staging(limit: u32) -> Staging {
        Staging::new(&[(Slot(0), 1000), (Slot(1), 50)], limit).unwrap()
    }

    fn lengths(staging: &Staging, wanted: &PageRuns) -> Vec<usize> {
        let mut out = Vec::new();
        staging.iovecs(wanted, &mut out).unwrap();
        out.iter().map(|v| v.iov_len / PAGE_SIZE).collect()
    }

    #[test]
    fn a_run_staged_at_once_is_one_vector() {
        let mut staging = staging(100);
        let wanted = runs(&[run(0, 10, 20), run(1, 0, 5)]);
        staging.reserve(&wanted).unwrap();
        assert_eq!(lengths(&staging, &wanted), [20, 5]);
        assert_eq!(lengths(&staging, &runs(&[run(0, 12, 2)])), [2]);
        assert_eq!(staging.pages(), 25);
    }

    #[test]
    fn a_page_staged_again_keeps_its_frame() {
        let mut staging = staging(100);
        staging.reserve(&runs(&[run(0, 10, 1)])).unwrap();
        staging.reserve(&runs(&[run(0, 9, 3)])).unwrap();
        assert_eq!(staging.pages(), 3);
        assert_eq!(lengths(&staging, &runs(&[run(0, 9, 3)])), [1, 1, 1]);
    }

    #[test]
    fn over_the_bound_is_an_error_and_clearing_makes_room() {
        let mut staging = staging(10);
        let error = staging.reserve(&runs(&[run(0, 0, 11)])).unwrap_err();
        assert!(matches!(error, StagingError::Full { limit: 10, more: 1 }));
        staging.clear();
        assert!(!staging.contains(Slot(0), 0));
        staging.reserve(&runs(&[run(0, 500, 10)])).unwrap();
        staging.shrink(0);
        assert!(staging.contains(Slot(0), 500));
    }

    #[test]
    fn pages_outside_or_absent_are_errors_that_leave_no_trace() {
        let mut staging = staging(10);
        assert!(staging.reserve(&runs(&[run(1, 49, 2)])).is_err());
        assert!(staging.reserve(&runs(&[run(2, 0, 1)])).is_err());
        staging.reserve(&runs(&[run(0, 0, 1)])).unwrap();
        let mut out = Vec::new();
        let error = staging
            .iovecs(&runs(&[run(0, 0, 2)]), &mut out)
            .unwrap_err();
        assert_eq!(error.to_string(), "page 0x1 of slot 0 is not staged");
        assert!(out.is_empty());
    }
}
