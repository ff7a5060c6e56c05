//! Output that waits: until both guests have said it, or until a checkpoint covers it.
//!
//! This is the seam for other comparators. [`Outlet`](super::outlet::Outlet) asks only what stands
//! here, so a comparator of flows, which holds and releases per connection, takes the place of
//! [`Agreement`] without a change of the outlet or of a role.

use bytes::Bytes;

use super::{
    compare::{Comparator, Compared},
    held::Held,
};
use crate::{id::Epoch, time::Instant};

/// Held frames in one queue, compared whole.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Agreement {
    held: Held,
    comparator: Comparator,
}

impl Agreement {
    /// Nothing is held; at most `most_bytes` will be.
    pub(crate) const fn new(most_bytes: usize) -> Self {
        Self {
            held: Held::new(most_bytes),
            comparator: Comparator::new(most_bytes),
        }
    }

    /// The checkpoint since which output is compared.
    pub(crate) const fn epoch(&self) -> Epoch {
        self.comparator.epoch()
    }

    /// Holds a frame that this host's guest said after capture `since`, when it had been given
    /// client frames up to `inputs`; it is compared if `compare` says so and it belongs to the
    /// interval. False if the bound is reached: the frame is lost, as on any wire.
    pub(crate) fn ours(
        &mut self,
        now: Instant,
        since: Epoch,
        inputs: u64,
        frame: Bytes,
        compare: bool,
    ) -> bool {
        let compared = (compare && since == self.epoch()).then(|| frame.clone());
        if self.held.push(now, since, inputs, frame).is_err() {
            return false;
        }
        if let Some(frame) = compared {
            self.comparator.ours(frame);
        }
        true
    }

    /// A frame that the peer's guest said after checkpoint `epoch`.
    pub(crate) fn theirs(&mut self, epoch: Epoch, frame: Bytes) {
        self.comparator.theirs(epoch, frame);
    }

    /// Output commit, first way: the next frame that both guests said, if the other host has
    /// stored the client frames it answers (up to `acked`).
    ///
    /// As long as frames are compared whole, agreeing implies the latter: a guest that said the
    /// same has the same inputs, and they are acknowledged first. A comparator that looks at
    /// payloads alone needs the rule.
    pub(crate) fn agreed(&mut self, acked: u64) -> Option<Bytes> {
        self.held.release_agreed(self.comparator.matched(), acked)
    }

    /// Output commit, second way: the next frame that checkpoint `epoch` covers.
    pub(crate) fn covered(&mut self, epoch: Epoch) -> Option<Bytes> {
        self.held.release_covered(epoch)
    }

    /// The next frame, whatever was said about it.
    pub(crate) fn any(&mut self) -> Option<Bytes> {
        self.held.release_all()
    }

    /// The peer holds `epoch`: a new interval begins. With `compare`, what the guest here has said
    /// in it already is compared too.
    pub(crate) fn commit(&mut self, epoch: Epoch, compare: bool) {
        self.held.commit(epoch);
        self.comparator.commit(epoch);
        if compare {
            for frame in self.held.since_commit() {
                self.comparator.ours(frame.clone());
            }
        }
    }

    /// How many frames of the interval have left because both said them.
    pub(crate) const fn left(&self) -> u64 {
        self.held.agreed()
    }

    /// Whether the guests have parted; said once an interval.
    pub(crate) fn diverged(&mut self) -> bool {
        matches!(self.comparator.poll(), Some(Compared::Diverged(_)))
    }

    /// When the oldest frame that still waits came.
    pub(crate) fn oldest(&self) -> Option<Instant> {
        self.held.oldest()
    }

    /// Whether more than half of the bound is used.
    pub(crate) const fn filling(&self) -> bool {
        self.held.filling()
    }

    /// The first frame of the interval that waits.
    #[cfg(feature = "mutations")]
    pub(crate) fn first(&self) -> Option<Bytes> {
        self.held.since_commit().next().cloned()
    }
}
