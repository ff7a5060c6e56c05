//! Output of the primary's guest that has not been released yet, in order.

use alloc::collections::VecDeque;
use bytes::Bytes;

use super::weight;

use crate::{id::Epoch, time::Instant};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Frame {
    since: Epoch,
    inputs: u64,
    arrived: Instant,
    bytes: Bytes,
}

/// A FIFO: nothing overtakes, so the world sees frames in the order the guest said them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Held {
    frames: VecDeque<Frame>,
    bytes: usize,
    most_bytes: usize,
    /// Frames since the last commit that were released by agreement; they precede the queue.
    agreed: u64,
    epoch: Epoch,
}

impl Held {
    pub(crate) const fn new(most_bytes: usize) -> Self {
        Self {
            frames: VecDeque::new(),
            bytes: 0,
            most_bytes,
            agreed: 0,
            epoch: Epoch(0),
        }
    }

    /// Holds a frame that the guest said after capture `since`, when it had been given client
    /// frames up to `inputs`. Gives it back if the bound is reached.
    pub(crate) fn push(
        &mut self,
        now: Instant,
        since: Epoch,
        inputs: u64,
        bytes: Bytes,
    ) -> Result<(), Bytes> {
        if self.bytes + weight(&bytes) > self.most_bytes {
            return Err(bytes);
        }
        self.bytes += weight(&bytes);
        self.frames.push_back(Frame {
            since,
            inputs,
            arrived: now,
            bytes,
        });
        Ok(())
    }

    /// Output commit, first way: the first `matched` frames since the checkpoint were said by both
    /// guests; those whose causes (`acked` client frames) the other side has stored may leave.
    pub(crate) fn release_agreed(&mut self, matched: u64, acked: u64) -> Option<Bytes> {
        let front = self.frames.front()?;
        if front.since != self.epoch || self.agreed >= matched || front.inputs > acked {
            return None;
        }
        self.agreed += 1;
        self.pop()
    }

    /// Output commit, second way: the peer holds checkpoint `epoch`, which covers everything said
    /// before it was captured. Call until `None`, then [`commit`](Self::commit).
    pub(crate) fn release_covered(&mut self, epoch: Epoch) -> Option<Bytes> {
        let front = self.frames.front()?;
        if front.since >= epoch {
            return None;
        }
        self.pop()
    }

    /// Without a peer nobody else could contradict: everything may leave.
    pub(crate) fn release_all(&mut self) -> Option<Bytes> {
        self.pop()
    }

    /// A new interval begins: agreement is counted from here.
    pub(crate) fn commit(&mut self, epoch: Epoch) {
        self.epoch = epoch;
        self.agreed = 0;
    }

    /// Frames said since the last commit, for the comparator.
    pub(crate) fn since_commit(&self) -> impl Iterator<Item = &Bytes> {
        self.frames
            .iter()
            .filter(|f| f.since == self.epoch)
            .map(|f| &f.bytes)
    }

    /// How many frames since the last commit have left.
    pub(crate) const fn agreed(&self) -> u64 {
        self.agreed
    }

    /// When the oldest frame that is not yet covered came.
    pub(crate) fn oldest(&self) -> Option<Instant> {
        self.frames.front().map(|f| f.arrived)
    }

    /// Whether more than half of the bound is used.
    pub(crate) const fn filling(&self) -> bool {
        self.bytes > self.most_bytes / 2
    }

    fn pop(&mut self) -> Option<Bytes> {
        let frame = self.frames.pop_front()?;
        self.bytes -= weight(&frame.bytes);
        Some(frame.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::FRAME_COST, *};

    fn push(held: &mut Held, since: u64, inputs: u64, text: &'static str) {
        let bytes = Bytes::from_static(text.as_bytes());
        held.push(Instant::ZERO, Epoch(since), inputs, bytes)
            .unwrap();
    }

    #[test]
    fn agreement_releases_in_order_and_only_what_the_peer_could_repeat() {
        let mut held = Held::new(1000);
        held.commit(Epoch(1));
        push(&mut held, 1, 5, "a");
        push(&mut held, 1, 7, "b");
        push(&mut held, 2, 7, "c");
        assert_eq!(held.release_agreed(2, 4), None, "input 5 is not stored");
        assert_eq!(held.release_agreed(2, 6).unwrap(), "a");
        assert_eq!(held.release_agreed(2, 6), None);
        assert_eq!(held.release_agreed(2, 7).unwrap(), "b");
        assert_eq!(
            held.release_agreed(9, 9),
            None,
            "said after a later capture"
        );
        assert_eq!(held.agreed(), 2);
    }

    #[test]
    fn a_checkpoint_covers_what_was_said_before_its_capture() {
        let mut held = Held::new(1000);
        push(&mut held, 1, 0, "a");
        push(&mut held, 2, 0, "b");
        assert_eq!(held.release_covered(Epoch(2)).unwrap(), "a");
        assert_eq!(held.release_covered(Epoch(2)), None);
        held.commit(Epoch(2));
        assert_eq!(held.since_commit().count(), 1);
    }

    #[test]
    fn the_bound_is_in_bytes() {
        let mut held = Held::new(FRAME_COST + 4);
        push(&mut held, 0, 0, "abc");
        assert!(held.filling());
        let back = held.push(Instant::ZERO, Epoch(0), 0, Bytes::from_static(b"de"));
        assert_eq!(back.unwrap_err(), "de");
    }
}
