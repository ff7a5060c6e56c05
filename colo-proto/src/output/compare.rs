//! Do both guests say the same?
//!
//! This comparator is the plainest one that is right: the n-th compared frame of one guest since
//! the checkpoint must equal the n-th of the other, byte for byte. Guests that agree on content
//! but not on framing diverge under it and are served by checkpoints instead. A comparator of byte
//! streams (spec output 6) goes into the same place, with the same inputs and outputs.

use alloc::collections::VecDeque;
use bytes::Bytes;

use super::weight;

use crate::id::Epoch;

/// Compares the output of the two guests since the last checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Comparator {
    epoch: Epoch,
    ours: VecDeque<Bytes>,
    theirs: VecDeque<Bytes>,
    bytes: usize,
    most_bytes: usize,
    matched: u64,
    diverged: Option<Divergence>,
    reported: bool,
}

/// News from the comparator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compared {
    /// So many frames of this guest, counted from the checkpoint, were said by both.
    Matched(u64),
    /// From here on nothing can be released before a checkpoint. Said once.
    Diverged(Divergence),
}

/// How the outputs differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Divergence {
    /// Two frames differ.
    Payload {
        /// Position of the first differing byte in the frame.
        at: u32,
    },
    /// One side said so much more than the other that the bound was reached.
    Overflow,
}

impl Comparator {
    /// An empty comparator that keeps at most `most_bytes` of unmatched frames.
    #[must_use]
    pub const fn new(most_bytes: usize) -> Self {
        Self {
            epoch: Epoch(0),
            ours: VecDeque::new(),
            theirs: VecDeque::new(),
            bytes: 0,
            most_bytes,
            matched: 0,
            diverged: None,
            reported: false,
        }
    }

    /// The epoch whose output is compared now.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// A frame of this host's guest, emitted since the checkpoint.
    pub fn ours(&mut self, frame: Bytes) {
        if self.diverged.is_none() {
            self.bytes += weight(&frame);
            self.ours.push_back(frame);
            self.compare();
        }
    }

    /// A frame of the peer's guest, emitted since the checkpoint `epoch`; one from before the
    /// last checkpoint is ignored.
    pub fn theirs(&mut self, epoch: Epoch, frame: Bytes) {
        if self.diverged.is_none() && epoch == self.epoch {
            self.bytes += weight(&frame);
            self.theirs.push_back(frame);
            self.compare();
        }
    }

    /// The peer holds the epoch: both guests start from the same state again.
    pub fn commit(&mut self, epoch: Epoch) {
        *self = Self {
            epoch,
            ..Self::new(self.most_bytes)
        };
    }

    /// The next news.
    pub fn poll(&mut self) -> Option<Compared> {
        let diverged = self.diverged.filter(|_| !self.reported)?;
        self.reported = true;
        Some(Compared::Diverged(diverged))
    }

    /// How many of this guest's frames since the checkpoint both have said.
    #[must_use]
    pub const fn matched(&self) -> u64 {
        self.matched
    }

    /// Whether a frame of this guest waits for the other to say the same.
    #[must_use]
    pub fn waiting(&self) -> bool {
        !self.ours.is_empty() || self.diverged.is_some()
    }

    fn compare(&mut self) {
        while let (Some(ours), Some(theirs)) = (self.ours.front(), self.theirs.front()) {
            if ours != theirs {
                let same = ours.iter().zip(theirs.iter()).take_while(|(a, b)| a == b);
                let at = u32::try_from(same.count()).unwrap_or(u32::MAX);
                return self.diverge(Divergence::Payload { at });
            }
            self.bytes -= weight(ours) + weight(theirs);
            self.matched += 1;
            self.ours.pop_front();
            self.theirs.pop_front();
        }
        if self.bytes > self.most_bytes {
            self.diverge(Divergence::Overflow);
        }
    }

    fn diverge(&mut self, how: Divergence) {
        self.diverged = Some(how);
        self.ours.clear();
        self.theirs.clear();
        self.bytes = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::FRAME_COST, *};

    proptest! {
        /// Equal output releases everything, whatever the interleaving; the first difference
        /// releases nothing after it.
        #[test]
        fn frames_match_up_to_the_first_difference(
            frames in proptest::collection::vec(0u8..4, 1..20),
            flip in proptest::option::of(0usize..20),
            order in any::<u64>(),
        ) {
            let mut c = Comparator::new(1 << 20);
            c.commit(Epoch(3));
            let (mut a, mut b) = (0, 0);
            let theirs = |n: usize| if flip == Some(n) { 9 } else { frames[n] };
            let mut bits = order;
            while a < frames.len() || b < frames.len() {
                if b >= frames.len() || (a < frames.len() && bits & 1 == 0) {
                    c.ours(Bytes::copy_from_slice(&[frames[a]]));
                    a += 1;
                } else {
                    c.theirs(Epoch(3), Bytes::copy_from_slice(&[theirs(b)]));
                    b += 1;
                }
                bits = bits.rotate_right(1);
            }
            let expected = flip.filter(|f| *f < frames.len()).unwrap_or(frames.len());
            prop_assert_eq!(c.matched(), expected as u64);
            prop_assert_eq!(c.poll().is_some(), expected < frames.len());
            prop_assert!(c.poll().is_none(), "said once");
        }
    }

    #[test]
    fn late_frames_are_ignored_and_the_bound_holds() {
        let mut c = Comparator::new(FRAME_COST + 10);
        c.commit(Epoch(2));
        c.theirs(Epoch(1), Bytes::from_static(b"old"));
        c.ours(Bytes::from_static(b"12345678"));
        assert!(c.waiting());
        assert_eq!(c.poll(), None);
        c.ours(Bytes::from_static(b"90a"));
        assert_eq!(c.poll(), Some(Compared::Diverged(Divergence::Overflow)));
        c.commit(Epoch(3));
        assert!(!c.waiting());
    }
}
