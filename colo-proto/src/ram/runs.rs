//! Bits to runs to chunks of bounded size.

use core::num::NonZeroU32;

use super::set::PageSet;
use crate::id::{PageRun, PageRuns, Slot};

/// Runs of a batch on the wire; more than that is asked for as it is needed.
const MOST_RESERVED: usize = crate::wire::BATCH_RUNS;

impl PageSet {
    /// Takes the lowest pages out of the set, at most `at_most` pages and `most_runs` runs.
    ///
    /// Cost is a glance at every word skipped and one step a run found, whatever the number of
    /// pages. Words known to be empty are not looked at again, so taking a whole set chunk by chunk
    /// is linear. The memory that a batch can need is asked for at once.
    pub fn take_runs(&mut self, at_most: u32, most_runs: usize) -> PageRuns {
        let mut runs = PageRuns::new();
        if !self.is_empty() {
            runs = PageRuns::with_capacity(most_runs.min(MOST_RESERVED));
        }
        self.take_runs_into(at_most, most_runs, &mut runs);
        runs
    }

    /// [`take_runs`](Self::take_runs) into a kept buffer, which is cleared first.
    pub fn take_runs_into(&mut self, at_most: u32, most_runs: usize, runs: &mut PageRuns) {
        runs.clear();
        let (mut room, mut left) = (at_most, most_runs);
        for bits in self.bits_mut() {
            let (slot, low) = (bits.slot, bits.low);
            // The run that grows: it may go on in the next word.
            let (mut first, mut end) = (0, 0);
            let mut full = false;
            let blocks = bits.words.get_mut(low..).unwrap_or_default();
            'slot: for (block, words) in blocks.chunks_mut(64).enumerate() {
                let mut busy = 0_u64;
                for (at, word) in words.iter().enumerate() {
                    busy |= u64::from(*word != 0) << at;
                }
                while busy != 0 {
                    let within = busy.trailing_zeros() as usize;
                    let Some(kept) = words.get_mut(within) else {
                        break;
                    };
                    let at = low + block * 64 + within;
                    let mut word = *kept;
                    while word != 0 {
                        // Adding the lowest one carries through the lowest run.
                        let carried = word.wrapping_add(word & word.wrapping_neg());
                        let from = word.trailing_zeros();
                        let ones = carried.trailing_zeros() - from;
                        let page = at as u64 * 64 + u64::from(from);
                        if page != end || first == end {
                            full = left == 0 || room == 0;
                            if full {
                                break;
                            }
                            append(runs, slot, first, end);
                            (first, end) = (page, page);
                            left -= 1;
                        }
                        if ones > room {
                            end += u64::from(room);
                            word &= !(((1 << room) - 1) << from);
                            (room, full) = (0, true);
                            break;
                        }
                        end += u64::from(ones);
                        room -= ones;
                        word &= carried;
                    }
                    *kept = word;
                    if full {
                        bits.low = at;
                        break 'slot;
                    }
                    busy &= busy - 1;
                }
            }
            append(runs, slot, first, end);
            if full {
                return;
            }
            bits.low = bits.words.len();
        }
    }
}

#[inline]
fn append(runs: &mut PageRuns, slot: Slot, first: u64, end: u64) {
    // At most `u32` pages are taken at once, so that the length fits.
    let pages = u32::try_from(end - first).unwrap_or(u32::MAX);
    if let Some(pages) = NonZeroU32::new(pages) {
        runs.push_apart(PageRun { slot, first, pages });
    }
}

#[cfg(test)]
mod tests {
    use alloc::{vec, vec::Vec};

    use proptest::prelude::*;

    use super::*;

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
