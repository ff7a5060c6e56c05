//! Client frames: numbered on the primary, stored on the secondary.
//!
//! The *cut* of a checkpoint is the index of the last client frame its state has consumed. Frames
//! after the cut are given to the secondary's guest again once it has loaded that state.

use alloc::collections::VecDeque;
use bytes::Bytes;

use super::{FRAME_COST, weight};

/// The primary's side: numbers, and how far the secondary has stored. Keeps lengths, not frames.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct InputLog {
    last: u64,
    acked: u64,
    /// The newest index that a state which the secondary holds has consumed.
    cut: u64,
    /// Frames up to here were not mirrored: the secondary has them only in a state.
    unmirrored: u64,
    /// Index and weight of mirrored frames since the last cut.
    since_cut: VecDeque<(u64, u32)>,
    bytes: usize,
    most_bytes: usize,
    was_mirrored: bool,
}

/// A numbered client frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Logged {
    /// Its index.
    pub index: u64,
    /// The frame before it was not mirrored: the secondary's log starts anew here.
    pub first: bool,
}

impl InputLog {
    /// An empty log whose uncut frames may hold `most_bytes`.
    #[must_use]
    pub const fn new(most_bytes: usize) -> Self {
        Self {
            last: 0,
            acked: 0,
            cut: 0,
            unmirrored: 0,
            since_cut: VecDeque::new(),
            bytes: 0,
            most_bytes,
            was_mirrored: false,
        }
    }

    /// A log whose next frame is numbered after `last`.
    #[must_use]
    pub const fn after(last: u64, most_bytes: usize) -> Self {
        let mut log = Self::new(most_bytes);
        log.last = last;
        log
    }

    /// Numbers a frame; `mirrored` if the secondary gets it. `None` if it would go over the bound:
    /// then neither guest may see it, as if the wire had lost it.
    pub fn push(&mut self, len: usize, mirrored: bool) -> Option<Logged> {
        if mirrored {
            // As the secondary counts it, which stores the frame.
            let weight = u32::try_from(len + FRAME_COST).unwrap_or(u32::MAX);
            if self.bytes + weight as usize > self.most_bytes {
                return None;
            }
            self.bytes += weight as usize;
            self.since_cut.push_back((self.last + 1, weight));
        }
        self.last += 1;
        let first = mirrored && !self.was_mirrored;
        if first {
            self.unmirrored = self.last - 1;
        }
        self.was_mirrored = mirrored;
        Some(Logged {
            index: self.last,
            first,
        })
    }

    /// Index of the newest frame.
    #[must_use]
    pub const fn last(&self) -> u64 {
        self.last
    }

    /// The peer stored every frame up to here, or holds a state that has consumed it.
    ///
    /// A frame that came before mirroring began and that the captured state had not consumed is in
    /// neither, whatever the peer has stored after it.
    #[must_use]
    pub const fn acked(&self) -> u64 {
        if self.cut < self.unmirrored || self.acked < self.cut {
            self.cut
        } else {
            self.acked
        }
    }

    /// The peer acknowledges storing frames up to `index`. False if it never got that one.
    pub fn ack(&mut self, index: u64) -> bool {
        if index > self.last {
            return false;
        }
        self.acked = self.acked.max(index);
        true
    }

    /// The peer holds a state that has consumed everything up to `cut`, which is as good as storing
    /// those frames.
    pub fn cut(&mut self, cut: u64) {
        self.cut = self.cut.max(cut.min(self.last));
        while let Some(&(index, weight)) = self.since_cut.front()
            && index <= cut
        {
            self.bytes -= weight as usize;
            self.since_cut.pop_front();
        }
    }

    /// Forgets the peer.
    pub fn forget_peer(&mut self) {
        self.since_cut.clear();
        self.bytes = 0;
        (self.acked, self.cut) = (0, 0);
        self.was_mirrored = false;
    }

    /// Whether more than half of the bound is used.
    #[must_use]
    pub const fn filling(&self) -> bool {
        self.bytes > self.most_bytes / 2
    }
}

/// The secondary's side: the frames after the last cut.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StoredInputs {
    frames: VecDeque<(u64, Bytes)>,
    bytes: usize,
    most_bytes: usize,
    last: Option<u64>,
    delivered: u64,
}

/// Why an arriving client frame cannot be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotStored {
    /// Not the successor of the last one.
    Gap {
        /// The index that had to come.
        expected: u64,
    },
    /// The bound in bytes would be exceeded.
    Full,
}

impl StoredInputs {
    /// The newest index that the guest here may know.
    #[must_use]
    pub fn newest(&self) -> u64 {
        self.last.unwrap_or(0).max(self.delivered)
    }

    /// Empty; keeps at most `most_bytes`.
    #[must_use]
    pub const fn new(most_bytes: usize) -> Self {
        Self {
            frames: VecDeque::new(),
            bytes: 0,
            most_bytes,
            last: None,
            delivered: 0,
        }
    }

    /// Stores a frame.
    ///
    /// # Errors
    /// [`NotStored`] if it is out of order or over the bound.
    pub fn push(&mut self, index: u64, frame: Bytes) -> Result<(), NotStored> {
        if let Some(last) = self.last
            && index != last.saturating_add(1)
        {
            return Err(NotStored::Gap {
                expected: last.saturating_add(1),
            });
        }
        if self.bytes + weight(&frame) > self.most_bytes {
            return Err(NotStored::Full);
        }
        self.bytes += weight(&frame);
        self.last = Some(index);
        self.frames.push_back((index, frame));
        Ok(())
    }

    /// Index of the newest stored frame.
    #[must_use]
    pub const fn last(&self) -> Option<u64> {
        self.last
    }

    /// Index of the newest frame that the guest was given.
    #[must_use]
    pub const fn given(&self) -> u64 {
        self.delivered
    }

    /// The next frame that the guest has not been given.
    pub fn poll(&mut self) -> Option<(u64, Bytes)> {
        let next = self.frames.iter().find(|(i, _)| *i > self.delivered)?;
        self.delivered = next.0;
        Some(next.clone())
    }

    /// The guest now has a state that consumed everything up to `cut` and nothing after: later
    /// frames are given again.
    pub fn rewind(&mut self, cut: u64) {
        while let Some((index, frame)) = self.frames.front()
            && *index <= cut
        {
            self.bytes -= weight(frame);
            self.frames.pop_front();
        }
        self.delivered = cut;
    }

    /// Forgets the frames: mirroring begins anew, with the same guest.
    pub fn begin_anew(&mut self) {
        let delivered = self.delivered;
        self.clear();
        self.delivered = delivered;
    }

    /// Forgets everything: another guest comes.
    pub fn clear(&mut self) {
        *self = Self::new(self.most_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_after_the_cut_are_given_again() {
        let mut stored = StoredInputs::new(1000);
        for i in 4..8 {
            stored.push(i, Bytes::from_static(b"x")).unwrap();
        }
        while stored.poll().is_some() {}
        stored.rewind(5);
        assert_eq!(stored.poll().unwrap().0, 6);
        assert_eq!(stored.poll().unwrap().0, 7);
        assert_eq!(stored.poll(), None);
    }

    #[test]
    fn gaps_and_floods_are_refused() {
        let mut stored = StoredInputs::new(FRAME_COST + 2);
        stored.push(9, Bytes::from_static(b"x")).unwrap();
        let gap = stored.push(11, Bytes::from_static(b"x"));
        assert_eq!(gap, Err(NotStored::Gap { expected: 10 }));
        let full = stored.push(10, Bytes::from_static(b"xx"));
        assert_eq!(full, Err(NotStored::Full));
    }

    #[test]
    fn the_log_counts_only_what_the_peer_must_keep() {
        let mut log = InputLog::new(FRAME_COST + 10);
        let index = |logged: Option<Logged>| logged.map(|l| (l.index, l.first));
        assert_eq!(index(log.push(8, false)), Some((1, false)));
        assert_eq!(index(log.push(8, true)), Some((2, true)));
        assert_eq!(log.push(3, true), None, "over the bound: dropped for both");
        assert!(log.filling());
        assert!(!log.ack(3), "never sent");
        assert!(log.ack(2));
        log.cut(2);
        assert_eq!(index(log.push(9, true)), Some((3, false)));
        log.cut(3);
        assert_eq!(
            log.acked(),
            3,
            "a state that consumed a frame is as good as the frame"
        );
    }

    #[test]
    fn what_came_before_mirroring_is_stored_only_by_a_state_that_consumed_it() {
        let mut log = InputLog::new(10_000);
        let push = |log: &mut InputLog, mirrored| log.push(8, mirrored).unwrap().index;
        // Two frames that the secondary is not sent, the second of which the guest has not read
        // when it is captured; then one that it is sent and stores.
        push(&mut log, false);
        push(&mut log, false);
        let mirrored = push(&mut log, true);
        assert!(log.ack(mirrored));
        log.cut(1);
        assert_eq!(log.acked(), 1, "frame 2 is on this host only");
        log.cut(2);
        assert_eq!(log.acked(), mirrored);
    }
}
