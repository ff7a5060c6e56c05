//! Bits to runs to chunks of bounded size.

use core::num::NonZeroU32;

use super::set::PageSet;
use crate::id::{PageRun, PageRuns};

impl PageSet {
    /// Takes the lowest pages out of the set, at most `at_most` pages and `most_runs` runs.
    ///
    /// Cost is one step a word skipped and one a run found, whatever the number of pages. Words
    /// known to be empty are not looked at again, so taking a whole set chunk by chunk is linear.
    pub fn take_runs(&mut self, at_most: u32, most_runs: usize) -> PageRuns {
        let mut runs = PageRuns::new();
        self.take_runs_into(at_most, most_runs, &mut runs);
        runs
    }

    /// [`take_runs`](Self::take_runs) into a kept buffer, which is cleared first.
    pub fn take_runs_into(&mut self, at_most: u32, most_runs: usize, runs: &mut PageRuns) {
        runs.clear();
        let mut room = at_most;
        let mut left = most_runs;
        // Where a run may be continued without being another one.
        let mut end = None;
        for bits in self.bits_mut() {
            let slot = bits.slot;
            for (at, kept) in bits.words.iter_mut().enumerate().skip(bits.low) {
                bits.low = at;
                let mut word = *kept;
                while word != 0 {
                    let from = word.trailing_zeros();
                    let ones = (!(word >> from)).trailing_zeros().min(64 - from).min(room);
                    let first = at as u64 * 64 + u64::from(from);
                    let joins = end == Some((slot, first));
                    let Some(pages) = NonZeroU32::new(ones).filter(|_| joins || left > 0) else {
                        *kept = word;
                        return;
                    };
                    left -= usize::from(!joins);
                    end = Some((slot, first + u64::from(ones)));
                    let mask = if ones == 64 {
                        u64::MAX
                    } else {
                        ((1 << ones) - 1) << from
                    };
                    word &= !mask;
                    // Runs come in order from a set, so push cannot refuse.
                    let refused = runs.push(PageRun { slot, first, pages });
                    debug_assert!(refused.is_ok(), "a set yields its runs in order");
                    room -= ones;
                }
                *kept = 0;
            }
            bits.low = bits.words.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::{vec, vec::Vec};

    use proptest::prelude::*;

    use super::*;
    use crate::id::Slot;

    fn pages(runs: &PageRuns) -> Vec<(u16, u64)> {
        runs.iter()
            .flat_map(|r| (r.first..r.end()).map(|p| (r.slot.0, p)))
            .collect()
    }

    #[test]
    fn a_run_crosses_words_and_stops_at_the_budget() {
        let mut set = PageSet::new(&[(Slot(0), 256)]);
        assert!(set.merge(Slot(0), &[1 << 63, u64::MAX, 1]));
        let runs = set.take_runs(10, 8);
        assert_eq!((runs.as_slice().len(), runs.pages()), (1, 10));
        assert_eq!(set.count(), 56);
        assert_eq!(set.take_runs(100, 8).as_slice()[0].first, 73);
        assert!(set.is_empty());
    }

    #[test]
    fn bits_beyond_the_slot_are_ignored() {
        let mut set = PageSet::new(&[(Slot(1), 65)]);
        assert!(set.merge(Slot(1), &[0, u64::MAX, u64::MAX]));
        assert_eq!(set.count(), 1);
        assert!(!set.merge(Slot(2), &[1]));
    }

    proptest! {
        #[test]
        fn taking_in_chunks_yields_every_page_once_in_order(
            words in proptest::collection::vec(any::<u64>(), 0..6),
            more in proptest::collection::vec(any::<u64>(), 0..3),
            chunk in 1u32..200,
            most_runs in 1usize..9,
        ) {
            let mut set = PageSet::new(&[(Slot(0), 300), (Slot(3), 100)]);
            set.merge(Slot(0), &words);
            set.merge(Slot(3), &more);
            let mut expect = vec![];
            for (slot, size, words) in [(0, 300, &words), (3, 100, &more)] {
                for page in 0..size {
                    if words.get(page as usize / 64).is_some_and(|w| w >> (page % 64) & 1 == 1) {
                        expect.push((slot, page));
                    }
                }
            }
            prop_assert_eq!(set.count(), expect.len() as u64);
            let mut got = vec![];
            loop {
                let runs = set.take_runs(chunk, most_runs);
                if runs.is_empty() { break; }
                prop_assert!(runs.pages() <= u64::from(chunk));
                prop_assert!(runs.as_slice().len() <= most_runs);
                got.extend(pages(&runs));
            }
            prop_assert_eq!(got, expect);
            prop_assert!(set.is_empty());
        }

        #[test]
        fn insert_and_remove_agree_with_single_bits(first in 0u64..200, len in 1u32..150) {
            let run = PageRun { slot: Slot(0), first, pages: NonZeroU32::new(len).unwrap() };
            let mut set = PageSet::new(&[(Slot(0), 256)]);
            let fits = first + u64::from(len) <= 256;
            prop_assert_eq!(set.insert(run), fits);
            prop_assert_eq!(set.count(), if fits { u64::from(len) } else { 0 });
            prop_assert_eq!(set.intersects(run), fits.then_some(true));
            prop_assert_eq!(set.remove(run), fits);
            prop_assert!(set.is_empty());
        }
    }
}
