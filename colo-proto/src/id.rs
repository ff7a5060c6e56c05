//! Names for the plain numbers of the protocol, so that an epoch is never taken for a page.

use alloc::vec::Vec;
use core::{fmt, num::NonZeroU32, ops::Range};

/// Bytes in a guest page. The protocol's unit of memory on every architecture it knows.
pub const PAGE_SIZE: u64 = 4096;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $inner);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}{}", stringify!($name), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// Number of a checkpoint; grows for as long as the VM lives, across takeovers. Epoch *e* is
    /// the state captured by checkpoint *e*; epoch 0 is the machine before its first capture.
    /// Output made after checkpoint *e* and before *e + 1* is covered by *e + 1*.
    Epoch(u64)
}
number! {
    /// Number of an ownership of the VM; grows by one at every grant (spec ownership 6).
    Generation(u64)
}
number! {
    /// A guest memory slot, as in KVM: one contiguous range of guest-physical memory.
    Slot(u16)
}
number! {
    /// A disk of the VM.
    DiskId(u16)
}
number! {
    /// A driver's name for one operation in flight.
    OpId(u64)
}

impl Epoch {
    /// The epoch after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl Generation {
    /// The generation after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// Which half of the pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Role {
    /// Serves the world.
    Primary,
    /// Holds or shadows the primary's state, ready to take over. What a host is until ownership
    /// makes it something else.
    #[default]
    Secondary,
}

impl Role {
    /// The other half.
    #[must_use]
    pub const fn peer(self) -> Self {
        match self {
            Self::Primary => Self::Secondary,
            Self::Secondary => Self::Primary,
        }
    }
}

/// One ordered byte stream between the hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Channel {
    /// Hello, checkpoint messages, device state.
    Control,
    /// Pages. Several lanes run in parallel; each is numbered from 0.
    Ram(u8),
    /// Mirrored input and the secondary's output.
    Net,
    /// Disk writes.
    Disk,
}

/// A run of consecutive pages of one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRun {
    /// The slot.
    pub slot: Slot,
    /// Index of the first page within the slot.
    pub first: u64,
    /// How many pages.
    pub pages: NonZeroU32,
}

impl PageRun {
    /// The page after the last one.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.first.saturating_add(self.pages.get() as u64)
    }

    /// Length in bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.pages.get() as u64 * PAGE_SIZE
    }
}

/// Runs of pages: sorted, disjoint and coalesced by construction.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct PageRuns(Vec<PageRun>);

impl PageRuns {
    /// No runs.
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// No runs, with room for this many.
    #[must_use]
    pub fn with_capacity(runs: usize) -> Self {
        Self(Vec::with_capacity(runs))
    }

    /// Appends a run that lies after every run already here, merging it with the last one where
    /// they touch.
    ///
    /// # Errors
    /// Gives the run back if it overlaps the last one or lies before it.
    #[inline]
    pub fn push(&mut self, run: PageRun) -> Result<(), PageRun> {
        if let Some(last) = self.0.last_mut() {
            if (run.slot, run.first) < (last.slot, last.end()) {
                return Err(run);
            }
            let joined = last.pages.checked_add(run.pages.get());
            if let (true, Some(pages)) = (run.slot == last.slot && run.first == last.end(), joined)
            {
                last.pages = pages;
                return Ok(());
            }
        }
        self.0.push(run);
        Ok(())
    }

    /// Appends a run that begins after the end of every run already here: the cheap way for who
    /// knows it.
    #[inline]
    pub(crate) fn push_apart(&mut self, run: PageRun) {
        debug_assert!(
            self.0
                .last()
                .is_none_or(|last| (last.slot, last.end()) < (run.slot, run.first)),
            "{run:?} does not lie apart"
        );
        self.0.push(run);
    }

    /// The runs, in order.
    pub fn iter(&self) -> core::slice::Iter<'_, PageRun> {
        self.0.iter()
    }

    /// The runs as a slice.
    #[must_use]
    pub fn as_slice(&self) -> &[PageRun] {
        &self.0
    }

    /// How many pages in all.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.0.iter().map(|r| u64::from(r.pages.get())).sum()
    }

    /// How many bytes in all.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pages() * PAGE_SIZE
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Forgets the runs and keeps the allocation.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

impl<'a> IntoIterator for &'a PageRuns {
    type Item = &'a PageRun;
    type IntoIter = core::slice::Iter<'a, PageRun>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// A range of bytes of one disk.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// The disk.
    pub disk: DiskId,
    /// Byte offsets, end exclusive.
    pub bytes: Range<u64>,
}

/// Where a piece of data lies in a driver's journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Spot {
    /// The journal chunk.
    pub chunk: u32,
    /// Byte offset within the chunk.
    pub at: u32,
    /// Length in bytes.
    pub len: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, pages: u32) -> PageRun {
        PageRun {
            slot: Slot(0),
            first,
            pages: NonZeroU32::new(pages).unwrap(),
        }
    }

    #[test]
    fn touching_runs_merge_and_disordered_ones_are_refused() {
        let mut runs = PageRuns::new();
        runs.push(run(3, 2)).unwrap();
        runs.push(run(5, 1)).unwrap();
        runs.push(run(9, 1)).unwrap();
        assert_eq!(runs.as_slice(), [run(3, 3), run(9, 1)]);
        assert_eq!(runs.push(run(9, 1)), Err(run(9, 1)));
        assert_eq!(runs.bytes(), 4 * PAGE_SIZE);
    }
}
