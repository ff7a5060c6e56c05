//! The secondary's side of a coming epoch: what has arrived, what to commit, what to abandon.
//!
//! `C` is what the driver keeps (a full cache or a staging area), `R` the guest's RAM, `L` the
//! pages that the secondary's own guest or devices wrote. Spec checkpoint 7.

use super::set::PageSet;
use crate::id::{PageRun, PageRuns, Slot};

/// How the secondary finds the contents of pages that only its own guest changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum CacheMode {
    /// A second copy of all of guest RAM on the secondary (QEMU's way): commits `received ∪ L`
    /// from the cache. Costs memory, saves traffic.
    Full,
    /// No second copy: the secondary reports `L` with its reply and the primary sends
    /// `dirty ∪ L`. Costs traffic, saves memory; free in standby mode, where `L` is empty.
    #[default]
    Union,
}

/// Pages of the epoch being received, and the secondary's own dirty pages.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cache {
    mode: CacheMode,
    received: PageSet,
    own: PageSet,
}

impl Cache {
    /// An empty cache over `slots`.
    #[must_use]
    pub fn new(mode: CacheMode, slots: &[(Slot, u64)]) -> Self {
        Self {
            mode,
            received: PageSet::new(slots),
            own: PageSet::new(slots),
        }
    }

    /// Notes that a run is about to be overwritten in the cache. False if the run lies outside
    /// the configured memory.
    pub fn receive(&mut self, run: PageRun) -> bool {
        self.received.insert(run)
    }

    /// Whether the run lies within the configured memory.
    #[must_use]
    pub fn within(&self, run: PageRun) -> bool {
        self.received.intersects(run).is_some()
    }

    /// Whether any page of the run has arrived for the coming epoch.
    #[must_use]
    pub fn has(&self, run: PageRun) -> bool {
        self.received.intersects(run) == Some(true)
    }

    /// Joins pages that this side's guest or devices wrote since the last commit.
    pub fn own_dirty(&mut self, slot: Slot, words: &[u64]) -> bool {
        self.own.merge(slot, words)
    }

    /// Pages written on this side since the last commit.
    #[must_use]
    pub fn own(&self) -> &PageSet {
        &self.own
    }

    /// How many distinct pages of the coming epoch have arrived.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received.count()
    }

    /// Drops a half-received epoch. `R` is untouched. With [`CacheMode::Full`] the cache is now a
    /// mixture of two epochs and must be filled anew before it may be committed again, so a
    /// connection that broke in an epoch starts with a full synchronisation.
    pub fn abandon(&mut self) {
        self.received.clear();
    }

    /// A first synchronisation begins: it replaces all of `R`, so that what this side wrote before
    /// is of no account.
    pub fn begin_anew(&mut self) {
        self.received.clear();
        self.own.clear();
    }

    /// The pages to copy into `R` now that the epoch is whole: everything received, and with a
    /// full cache everything this side wrote itself. Both sets are empty afterwards.
    pub fn commit(&mut self) -> PageRuns {
        if self.mode == CacheMode::Full {
            self.received.union(&self.own);
        }
        self.own.clear();
        self.received.take_runs(u32::MAX, usize::MAX)
    }

    /// Whether every page this side wrote is among those received: what a commit without a full
    /// cache needs. Always true with one.
    #[must_use]
    pub fn covers_own(&self) -> bool {
        self.mode == CacheMode::Full
            || self.own.slots().all(|(slot, _)| {
                let own = self.own.words(slot).unwrap_or_default();
                let received = self.received.words(slot).unwrap_or_default();
                own.iter()
                    .zip(received)
                    .all(|(own, received)| own & !received == 0)
            })
    }
}

#[cfg(test)]
mod tests {
    use core::num::NonZeroU32;

    use proptest::prelude::*;

    use super::*;

    const SLOTS: &[(Slot, u64)] = &[(Slot(0), 64)];

    fn page(n: u64) -> PageRun {
        PageRun {
            slot: Slot(0),
            first: n,
            pages: NonZeroU32::MIN,
        }
    }

    proptest! {
        /// Spec ram section 4: after the flush `R = P(n)` everywhere, whoever wrote what.
        #[test]
        fn after_a_commit_the_guest_is_the_primary(
            rounds in proptest::collection::vec((any::<u64>(), any::<u64>(), any::<bool>()), 1..20),
            full in any::<bool>(),
        ) {
            let mode = if full { CacheMode::Full } else { CacheMode::Union };
            let mut cache = Cache::new(mode, SLOTS);
            let (mut primary, mut store, mut guest) = ([0u32; 64], [0u32; 64], [0u32; 64]);
            for (n, (ours, theirs, whole)) in rounds.into_iter().enumerate() {
                let stamp = n as u32 + 1;
                for p in 0..64 {
                    if ours >> p & 1 == 1 { primary[p] = stamp; }
                    if theirs >> p & 1 == 1 { guest[p] = 1000 + stamp; }
                }
                cache.own_dirty(Slot(0), &[theirs]);
                if !whole {
                    // An abort in the middle: nothing of it may show, and everything is sent again.
                    let before = guest;
                    cache.receive(page(0));
                    cache.abandon();
                    prop_assert_eq!(guest, before);
                }
                // The primary sends what it wrote and, without a full cache, what we wrote.
                let sent = if full { ours } else { ours | cache.own().words(Slot(0)).unwrap()[0] };
                for p in 0..64 {
                    if sent >> p & 1 == 1 {
                        prop_assert!(cache.receive(page(p as u64)));
                        store[p] = primary[p];
                    }
                }
                prop_assert!(cache.covers_own());
                for run in &cache.commit() {
                    for p in run.first..run.end() { guest[p as usize] = store[p as usize]; }
                }
                prop_assert_eq!(guest, primary);
            }
        }
    }

    #[test]
    fn a_page_outside_memory_is_refused() {
        assert!(!Cache::new(CacheMode::Full, SLOTS).receive(page(64)));
    }

    #[test]
    fn without_a_full_cache_own_pages_must_have_been_sent() {
        let mut cache = Cache::new(CacheMode::Union, SLOTS);
        cache.own_dirty(Slot(0), &[0b11]);
        assert!(cache.receive(page(0)));
        assert!(!cache.covers_own());
        assert!(cache.receive(page(1)));
        assert!(cache.covers_own());
    }
}
