//! Which pages of our machine changed: KVM's log joined with our own writes, in one place.
//!
//! ```text
//!   guest's processors ──▶ KVM: bitmap (manual protect and clear) or ring ─┐
//!   devices in this process ──▶ OwnLog, one bit a page ────────────────────┼─▶ PageSet
//!   disks ──▶ PageStore::take_dirty ───────────────────────────────────────┤
//!   taken from the log but not delivered (a capture that failed) ──────────┘
//! ```
//!
//! A page is taken from the log *before* it is read: a write that comes between marks it again.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use colo_proto::ram::PageSet;

pub use crate::capture::OwnLog;
use crate::capture::{KvmLog, Rings};
use crate::memory::{Backing, Memory};

/// How KVM logs the guest's writes. What each costs is in `docs/memory-path.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DirtyMode {
    /// One bit a page, protected again by hand. Cost grows slowly with RAM, hardly with dirtiness.
    #[default]
    Bitmap,
    /// A ring of dirtied pages for each vCPU, of this many entries (a power of two). Cost follows
    /// the dirtied pages alone, and a full ring stops its vCPU until it is emptied.
    Ring(u32),
}

#[derive(Debug)]
enum Log {
    Bitmap(KvmLog),
    Ring(Arc<Rings>),
}

/// The joined dirty log of one VM.
#[derive(Debug)]
pub(crate) struct Dirty {
    log: Log,
    /// Pages that must be delivered though no log has them any more.
    owed: PageSet,
    /// One slot's words at a time; as long as the largest slot.
    scratch: Vec<u64>,
    tracking: bool,
}

impl Dirty {
    /// After the last vCPU is made: rings are mapped from their descriptors.
    pub(crate) fn new<'a>(
        mode: DirtyMode,
        vm: &impl AsRawFd,
        memory: &Memory,
        vcpus: impl Iterator<Item = &'a (impl AsRawFd + 'a)>,
    ) -> io::Result<Self> {
        let ram: Vec<_> = memory
            .slots()
            .iter()
            .filter(|entry| !entry.is_store())
            .map(|entry| (entry.slot, entry.pages))
            .collect();
        let log = match mode {
            DirtyMode::Bitmap => Log::Bitmap(KvmLog::new(vm, &ram)?),
            DirtyMode::Ring(entries) => Log::Ring(Arc::new(Rings::new(vm, &ram, vcpus, entries)?)),
        };
        let mut dirty = Self {
            log,
            owed: PageSet::default(),
            scratch: Vec::new(),
            tracking: false,
        };
        dirty.reshape(memory);
        Ok(dirty)
    }

    /// Sizes the buffers again after a slot was added.
    pub(crate) fn reshape(&mut self, memory: &Memory) {
        let shape = memory.shape();
        let longest = shape.iter().map(|(_, pages)| pages.div_ceil(64)).max();
        self.owed = PageSet::new(&shape);
        self.scratch = vec![0; usize::try_from(longest.unwrap_or(0)).unwrap_or(0)];
    }

    /// The rings, for vCPUs that find theirs full.
    pub(crate) fn rings(&self) -> Option<Arc<Rings>> {
        match &self.log {
            Log::Bitmap(_) => None,
            Log::Ring(rings) => Some(rings.clone()),
        }
    }

    /// Notes that logging was switched on or off. On: from here every page counts as dirty, since
    /// nobody knows what was written before.
    pub(crate) fn set_tracking(&mut self, on: bool) {
        self.tracking = on;
        self.owed.clear();
        if on {
            self.owed.fill();
        }
    }

    pub(crate) fn tracking(&self) -> bool {
        self.tracking
    }

    /// Gives pages back: they are part of the next collect.
    pub(crate) fn owe(&mut self, pages: &PageSet) {
        self.owed.union(pages);
    }

    /// Moves every page dirtied since the last call into `into` (joined with what is there) and
    /// protects it again. No allocation. After an error, what was taken is owed: it is part of the
    /// next collect.
    pub(crate) fn collect(&mut self, memory: &Memory, into: &mut PageSet) -> io::Result<()> {
        let collected = self.collect_into(memory, into);
        if collected.is_err() {
            self.owed.union(into);
            if matches!(self.log, Log::Ring(_)) {
                // A ring that overflowed has lost pages that nobody can name.
                self.owed.fill();
            }
        }
        collected
    }

    fn collect_into(&mut self, memory: &Memory, into: &mut PageSet) -> io::Result<()> {
        if !self.owed.is_empty() {
            into.union(&self.owed);
            self.owed.clear();
        }
        match &mut self.log {
            Log::Bitmap(log) => log.collect(into, |slot, words| {
                let entry = memory.slots().iter().find(|entry| entry.slot == slot);
                if let Some(Backing::Ram { map, .. }) = entry.map(|entry| &entry.backing) {
                    map.bitmap().take(words);
                }
            })?,
            Log::Ring(rings) => rings.collect(into)?,
        }
        for entry in memory.slots() {
            let len = usize::try_from(entry.pages.div_ceil(64)).unwrap_or(0);
            let Some(words) = self.scratch.get_mut(..len) else {
                continue;
            };
            match (&entry.backing, &self.log) {
                (Backing::Ram { .. }, Log::Bitmap(_)) => continue,
                (Backing::Ram { map, .. }, Log::Ring(rings)) => {
                    words.fill(0);
                    rings.relieved(entry.slot, words);
                    map.bitmap().take(words);
                }
                (Backing::Store(store), _) => {
                    words.fill(0);
                    store.take_dirty(words);
                }
            }
            into.merge(entry.slot, words);
        }
        Ok(())
    }
}
