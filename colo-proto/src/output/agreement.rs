//! Output that waits: until both guests have said it, or until a checkpoint covers it.
//!
//! A conversation waits for itself only: what one of them holds back does not hold its neighbours.

use alloc::collections::{BTreeMap, VecDeque};
use bytes::Bytes;

use super::flow::{Divergence, Flows, Limits, Report};
use crate::{id::Epoch, time::Instant};

/// What a frame takes besides its bytes.
const FRAME: usize = size_of::<(u64, Frame)>() + size_of::<Report>();

/// Held frames, by the order in which the guest said them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Agreement {
    flows: Flows,
    held: BTreeMap<u64, Frame>,
    next: u64,
    bytes: usize,
    most_bytes: usize,
    /// What both guests have said and may leave as soon as the other host stores what it answers.
    ready: VecDeque<u64>,
    /// What the other host must know of connections, in order; how often there was something.
    reports: VecDeque<Report>,
    reported: u64,
    /// How many of the other guest's first frames since the checkpoint have been said here.
    left: u64,
    /// Something has left that the comparator has not seen.
    unfollowed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Frame {
    since: Epoch,
    needs: Stored,
    /// The comparator has seen it.
    followed: bool,
    bytes: Bytes,
}

/// What the other host stores: client frames up to an index, and so many reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Stored {
    pub(crate) inputs: u64,
    pub(crate) reports: u64,
}

impl Agreement {
    /// Nothing is held; at most `most_bytes` will be. The seed keys the table of flows.
    pub(crate) const fn new(limits: Limits, seed: u64) -> Self {
        Self {
            flows: Flows::new(limits, seed),
            held: BTreeMap::new(),
            next: 0,
            bytes: 0,
            most_bytes: limits.bytes,
            ready: VecDeque::new(),
            reports: VecDeque::new(),
            reported: 0,
            left: 0,
            unfollowed: false,
        }
    }

    /// The checkpoint since which output is compared.
    pub(crate) const fn epoch(&self) -> Epoch {
        self.flows.epoch()
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
        if self.bytes + frame.len() + FRAME > self.most_bytes {
            return false;
        }
        let tag = self.next;
        self.next += 1;
        self.bytes += frame.len() + FRAME;
        let needs = Stored { inputs, reports: 0 };
        let held = Frame {
            since,
            needs,
            followed: false,
            bytes: frame,
        };
        self.held.insert(tag, held);
        if compare && since == self.epoch() {
            self.compare(now, tag);
        }
        true
    }

    /// A frame that the peer's guest said after checkpoint `epoch`.
    pub(crate) fn theirs(&mut self, now: Instant, epoch: Epoch, frame: &Bytes) {
        self.flows.theirs(now, epoch, frame);
    }

    /// Output commit, first way: the next frame that both guests said, if the other host has
    /// stored what it answers and what it needs to know of the connection.
    pub(crate) fn agreed(&mut self, stored: Stored) -> Option<Bytes> {
        while let Some(tag) = self.flows.agreed() {
            self.ready.push_back(tag);
        }
        let needs = self.held.get(self.ready.front()?)?.needs;
        if needs.inputs > stored.inputs || needs.reports > stored.reports {
            return None;
        }
        let tag = self.ready.pop_front()?;
        self.take(tag)
    }

    /// Output commit, second way: the next frame that checkpoint `epoch` covers.
    pub(crate) fn covered(&mut self, epoch: Epoch) -> Option<Bytes> {
        let (&tag, first) = self.held.first_key_value()?;
        if first.since >= epoch {
            return None;
        }
        self.take(tag)
    }

    /// The next frame, whatever was said about it.
    pub(crate) fn any(&mut self) -> Option<Bytes> {
        let tag = *self.held.first_key_value()?.0;
        self.take(tag)
    }

    /// The peer holds `epoch`: a new interval begins. With `compare`, what the guest here has said
    /// in it already is compared too.
    pub(crate) fn commit(&mut self, now: Instant, epoch: Epoch, compare: bool) {
        self.flows.commit(now, epoch);
        if compare && core::mem::take(&mut self.unfollowed) {
            self.flows.lose_track();
        }
        self.ready.clear();
        self.left = 0;
        if !compare {
            return;
        }
        let said = self.held.iter().filter(|(_, frame)| frame.since == epoch);
        let tags: alloc::vec::Vec<u64> = said.map(|(tag, _)| *tag).collect();
        for tag in tags {
            self.compare(now, tag);
        }
    }

    /// Output leaves without being held until the next capture, and nobody follows it here.
    pub(crate) fn open(&mut self, now: Instant, epoch: Epoch) {
        self.commit(now, epoch, false);
        // What was reported meanwhile went to nobody, and another peer counts from nought.
        self.forget_peer();
        self.unfollowed = true;
    }

    /// The peer's guest runs from now on.
    pub(crate) fn resumed(&mut self, now: Instant) {
        self.flows.resumed(now);
    }

    /// The peer is gone, with what it knew of connections.
    pub(crate) fn forget_peer(&mut self) {
        self.reports.clear();
        self.reported = 0;
        self.flows.forget_peer();
    }

    /// The next thing that the other host must know.
    pub(crate) fn poll_report(&mut self) -> Option<Report> {
        self.reports.pop_front()
    }

    /// How many reports there were.
    pub(crate) const fn reported(&self) -> u64 {
        self.reported
    }

    /// How many of the other guest's first frames of the interval the world has heard from here, if
    /// that is news.
    pub(crate) fn left(&mut self) -> Option<u64> {
        let left = self.flows.accounted();
        if !self.ready.is_empty() || left == self.left {
            return None;
        }
        self.left = left;
        Some(left)
    }

    /// How guests have parted in a conversation; said once an interval of each.
    pub(crate) fn parted(&mut self) -> Option<Divergence> {
        self.flows.parted()
    }

    /// When a frame has waited too long for its match.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.flows.poll_timeout()
    }

    /// Looks for those that have.
    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        self.flows.handle_timeout(now);
    }

    /// Whether more than half of the bound is used.
    pub(crate) const fn filling(&self) -> bool {
        self.bytes > self.most_bytes / 2
    }

    /// The first frame of the interval that waits.
    #[cfg(feature = "mutations")]
    pub(crate) fn first(&self) -> Option<Bytes> {
        let epoch = self.epoch();
        let mut frames = self.held.values();
        frames
            .find(|frame| frame.since == epoch)
            .map(|frame| frame.bytes.clone())
    }

    fn compare(&mut self, now: Instant, tag: u64) {
        let Some(frame) = self.held.get_mut(&tag) else {
            return;
        };
        if let Some(report) = self.flows.ours(now, tag, &frame.bytes) {
            self.reported += 1;
            self.reports.push_back(report);
        }
        // A segment may show what an earlier one of its connection was reported for, and overtakes
        // that one if it says nothing new.
        frame.needs.reports = self.reported;
        frame.followed = true;
    }

    fn take(&mut self, tag: u64) -> Option<Bytes> {
        let frame = self.held.remove(&tag)?;
        self.unfollowed |= !frame.followed;
        self.bytes -= frame.bytes.len() + FRAME;
        Some(frame.bytes)
    }
}

#[cfg(test)]
mod tests {
    use core::time::Duration;

    use super::*;

    const LIMITS: Limits = Limits {
        bytes: 4096,
        header: 0,
        soonest: Duration::from_millis(10),
        latest: Duration::from_millis(100),
    };

    fn agreement() -> Agreement {
        let mut agreement = Agreement::new(LIMITS, 1);
        agreement.commit(Instant::ZERO, Epoch(1), true);
        agreement
    }

    /// A segment with a timestamp.
    fn stamped(seq: u32, stamp: u32, payload: &[u8]) -> Bytes {
        let mut options = alloc::vec![8, 10];
        options.extend(stamp.to_be_bytes());
        options.extend([0; 4]);
        let frame = crate::output::packet::sample::Sample::PLAIN;
        frame.tcp_with(seq, &options, payload).into()
    }

    fn ours(agreement: &mut Agreement, since: u64, inputs: u64, text: &'static str) -> bool {
        let frame = Bytes::from_static(text.as_bytes());
        agreement.ours(Instant::ZERO, Epoch(since), inputs, frame, true)
    }

    fn theirs(agreement: &mut Agreement, text: &'static str) {
        let frame = Bytes::from_static(text.as_bytes());
        agreement.theirs(Instant::ZERO, agreement.epoch(), &frame);
    }

    const fn stored(inputs: u64) -> Stored {
        Stored { inputs, reports: 0 }
    }

    #[test]
    fn agreement_releases_in_order_and_only_what_the_peer_could_repeat() {
        let mut waiting = agreement();
        for (since, inputs, text) in [(1, 5, "a"), (1, 7, "b"), (2, 7, "c")] {
            assert!(ours(&mut waiting, since, inputs, text));
            theirs(&mut waiting, text);
        }
        assert_eq!(waiting.agreed(stored(4)), None, "input 5 is not stored");
        assert_eq!(waiting.left(), None, "nothing has left");
        assert_eq!(waiting.agreed(stored(6)).unwrap(), "a");
        assert_eq!(waiting.agreed(stored(6)), None);
        assert_eq!(waiting.agreed(stored(7)).unwrap(), "b");
        assert_eq!(
            waiting.agreed(stored(9)),
            None,
            "said after a later capture"
        );
        assert_eq!(waiting.left(), Some(2));
        assert_eq!(waiting.left(), None, "no news");
    }

    #[test]
    fn no_segment_leaves_before_what_the_peer_must_know_of_its_connection() {
        let mut waiting = agreement();
        let say = |waiting: &mut Agreement, frame: Bytes| {
            assert!(waiting.ours(Instant::ZERO, Epoch(1), 0, frame, true));
        };
        // The clock of the first is reported. It waits for the other guest, and an acknowledgement
        // that shows the same clock does not.
        say(&mut waiting, stamped(1000, 500, b"abc"));
        assert!(waiting.poll_report().is_some());
        let acknowledgement = stamped(1003, 501, b"");
        say(&mut waiting, acknowledgement.clone());
        assert_eq!(waiting.agreed(stored(0)), None, "the report is not stored");
        let reports = 1;
        let stored = Stored { inputs: 0, reports };
        assert_eq!(waiting.agreed(stored), Some(acknowledgement));
    }

    #[test]
    fn a_connection_that_nobody_followed_for_a_while_is_compared_from_where_it_is() {
        let mut waiting = agreement();
        let far = 1003u32.wrapping_sub(1 << 30);
        for compared in [true, false] {
            let (now, epoch) = (Instant::ZERO, waiting.epoch());
            let frame = stamped(if compared { 1000 } else { far - 3 }, 1, b"abc");
            assert!(waiting.ours(now, epoch, 0, frame.clone(), compared));
            if compared {
                waiting.theirs(now, epoch, &frame);
                let reports = waiting.reported();
                let stored = Stored { inputs: 0, reports };
                assert_eq!(waiting.agreed(stored), Some(frame));
            }
            let next = epoch.next();
            while waiting.covered(next).is_some() {}
            waiting.commit(now, next, !compared);
        }
        // It may have wrapped, or be another connection: its number is behind the one that was last
        // followed, and yet nobody else has said this.
        let (now, epoch) = (Instant::ZERO, waiting.epoch());
        let frame = stamped(far, 2, b"new");
        assert!(waiting.ours(now, epoch, 0, frame.clone(), true));
        let reports = waiting.reported();
        let stored = Stored { inputs: 0, reports };
        assert_eq!(waiting.agreed(stored), None, "only one guest has said it");
        waiting.theirs(now, epoch, &frame);
        assert_eq!(waiting.agreed(stored), Some(frame));
    }

    #[test]
    fn a_checkpoint_covers_what_was_said_before_its_capture() {
        let mut waiting = agreement();
        ours(&mut waiting, 1, 0, "a");
        ours(&mut waiting, 2, 0, "b");
        assert_eq!(waiting.covered(Epoch(2)).unwrap(), "a");
        assert_eq!(waiting.covered(Epoch(2)), None);
        waiting.commit(Instant::ZERO, Epoch(2), true);
        theirs(&mut waiting, "b");
        assert_eq!(waiting.agreed(stored(0)).unwrap(), "b");
    }

    #[test]
    fn the_bound_counts_what_a_frame_takes() {
        let mut waiting = agreement();
        let mut held = 0;
        while ours(&mut waiting, 0, 0, "abc") {
            held += 1;
        }
        assert_eq!(held, 4096 / (FRAME + 3));
        assert!(waiting.filling());
        while waiting.any().is_some() {}
        assert_eq!(waiting.bytes, 0);
    }
}
