//! A set of guest pages in the layout of `KVM_GET_DIRTY_LOG`: one bit a page, little end first.

use alloc::{vec, vec::Vec};

use crate::id::{PageRun, Slot};

/// A set of pages over the slots of one VM.
///
/// The words of a slot are exactly those that KVM hands out, so joining a dirty log is one OR a
/// word: 128 KiB for 4 GiB of guest.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct PageSet {
    slots: Vec<SlotBits>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct SlotBits {
    pub(super) slot: Slot,
    pub(super) pages: u64,
    pub(super) words: Vec<u64>,
    /// No word below this one has a bit set.
    pub(super) low: usize,
}

impl PageSet {
    /// An empty set over `slots`, given as (slot, size in pages). Sizes come from the local
    /// configuration, never from a peer.
    #[must_use]
    pub fn new(slots: &[(Slot, u64)]) -> Self {
        let mut slots: Vec<SlotBits> = slots
            .iter()
            .map(|&(slot, pages)| {
                let len = usize::try_from(pages.div_ceil(64)).unwrap_or(0);
                SlotBits {
                    slot,
                    pages,
                    words: vec![0; len],
                    low: len,
                }
            })
            .collect();
        slots.sort_by_key(|s| s.slot);
        Self { slots }
    }

    /// ORs the words of a dirty log into the set. Bits beyond the slot's size and words of an
    /// unknown slot are ignored; the answer tells whether the slot is known.
    pub fn merge(&mut self, slot: Slot, words: &[u64]) -> bool {
        let Some(bits) = self.slot_mut(slot) else {
            return false;
        };
        let mut low = bits.low;
        for (at, (have, &new)) in bits.words.iter_mut().zip(words).enumerate() {
            if new != 0 {
                *have |= new;
                low = low.min(at);
            }
        }
        bits.low = low;
        bits.mask_tail();
        true
    }

    /// Adds every page of `other`.
    pub fn union(&mut self, other: &Self) {
        for bits in &other.slots {
            self.merge(bits.slot, &bits.words);
        }
    }

    /// Adds a run. False, and no change, if it does not lie within a known slot.
    pub fn insert(&mut self, run: PageRun) -> bool {
        self.change(run, |word, mask| *word |= mask)
    }

    /// Removes a run. False, and no change, if it does not lie within a known slot.
    pub fn remove(&mut self, run: PageRun) -> bool {
        self.change(run, |word, mask| *word &= !mask)
    }

    /// Whether any page of the run is in the set; `None` if it does not lie within a known slot.
    #[must_use]
    pub fn intersects(&self, run: PageRun) -> Option<bool> {
        let bits = self.slots.iter().find(|b| b.slot == run.slot)?;
        if run.end() > bits.pages {
            return None;
        }
        Some(masks(run).any(|(at, mask)| bits.words.get(at).is_some_and(|w| w & mask != 0)))
    }

    /// How many pages are in the set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.slots
            .iter()
            .map(|b| {
                b.words
                    .iter()
                    .map(|w| u64::from(w.count_ones()))
                    .sum::<u64>()
            })
            .sum()
    }

    /// Whether the set is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots
            .iter()
            .all(|b| b.words.iter().skip(b.low).all(|&w| w == 0))
    }

    /// Removes every page and keeps the memory.
    pub fn clear(&mut self) {
        for bits in &mut self.slots {
            bits.words.fill(0);
            bits.low = bits.words.len();
        }
    }

    /// Adds every page of every slot.
    pub fn fill(&mut self) {
        for bits in &mut self.slots {
            bits.words.fill(u64::MAX);
            bits.low = 0;
            bits.mask_tail();
        }
    }

    /// Slots and their sizes in pages.
    pub fn slots(&self) -> impl Iterator<Item = (Slot, u64)> + '_ {
        self.slots.iter().map(|b| (b.slot, b.pages))
    }

    /// The words of one slot, as KVM lays them out.
    #[must_use]
    pub fn words(&self, slot: Slot) -> Option<&[u64]> {
        self.slots
            .iter()
            .find(|b| b.slot == slot)
            .map(|b| b.words.as_slice())
    }

    pub(super) fn bits_mut(&mut self) -> &mut [SlotBits] {
        &mut self.slots
    }

    fn slot_mut(&mut self, slot: Slot) -> Option<&mut SlotBits> {
        self.slots.iter_mut().find(|b| b.slot == slot)
    }

    fn change(&mut self, run: PageRun, apply: impl Fn(&mut u64, u64)) -> bool {
        let Some(bits) = self.slot_mut(run.slot).filter(|b| run.end() <= b.pages) else {
            return false;
        };
        for (at, mask) in masks(run) {
            if let Some(word) = bits.words.get_mut(at) {
                apply(word, mask);
                bits.low = bits.low.min(at);
            }
        }
        true
    }
}

impl SlotBits {
    fn mask_tail(&mut self) {
        let tail = self.pages % 64;
        if let (1.., Some(last)) = (tail, self.words.last_mut()) {
            *last &= (1 << tail) - 1;
        }
    }
}

/// The words that a run touches and the bits it takes in each.
fn masks(run: PageRun) -> impl Iterator<Item = (usize, u64)> {
    let (first, end) = (run.first, run.end());
    (first / 64..end.div_ceil(64)).filter_map(move |word| {
        let from = first.max(word * 64) - word * 64;
        let upto = end.min((word + 1) * 64) - word * 64;
        let ones = if upto - from == 64 {
            u64::MAX
        } else {
            ((1 << (upto - from)) - 1) << from
        };
        Some((usize::try_from(word).ok()?, ones))
    })
}
