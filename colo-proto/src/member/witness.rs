//! What is known of the arbiter: when it last answered, and whether both nodes see the same one.
//!
//! A read is also a write: it leaves its request's number in the register, and is answered with the
//! number that was there. A node that finds the number that its peer says it left there sees the
//! same register as the peer; a copy of the register, or another one, does not grow along.

use core::time::Duration;

use super::RequestId;
use crate::time::Instant;

/// The arbiter as this node sees it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Witness {
    /// When it last answered as it should.
    pub(super) heard: Instant,
    /// When an operator was last told that it does not.
    pub(super) alarm: Instant,
    /// When it is read next.
    pub(super) next: Instant,
    /// Its last answer was from before what is known: it lost its register, or is another one.
    pub(super) foreign: bool,
    /// The number that this node last left there.
    pub(super) mine: RequestId,
    /// What was found there last.
    found: RequestId,
    /// The last two that the peer says it left there.
    theirs: [RequestId; 2],
    /// When one of those was last found.
    met: Option<Instant>,
}

impl Witness {
    pub(super) const fn new(now: Instant) -> Self {
        let none = RequestId(0);
        Self {
            heard: now,
            alarm: now,
            next: now,
            foreign: false,
            mine: none,
            found: none,
            theirs: [none; 2],
            met: None,
        }
    }

    /// It answered something that fits what is known.
    pub(super) const fn answered(&mut self, now: Instant) {
        self.heard = now;
        self.foreign = false;
    }

    /// A read was answered: `left` is there now, `found` was.
    pub(super) fn read(&mut self, now: Instant, left: RequestId, found: RequestId) {
        self.mine = left;
        self.found = found;
        self.compare(now);
    }

    /// The peer says what it left there.
    pub(super) fn peer_left(&mut self, now: Instant, mark: RequestId) {
        if mark != RequestId(0) && mark != self.theirs[0] {
            self.theirs = [mark, self.theirs[0]];
            self.compare(now);
        }
    }

    /// The register holds what only the peer can have put there.
    pub(super) const fn met(&mut self, now: Instant) {
        self.met = Some(now);
    }

    /// Whether the peer has not yet said what it left there.
    pub(super) fn is_new_to_peer(&self) -> bool {
        self.met.is_none()
    }

    fn compare(&mut self, now: Instant) {
        if self.found != RequestId(0) && self.theirs.contains(&self.found) {
            self.met = Some(now);
        }
    }

    /// Nobody listened for a while: what was known is not older than `floor`.
    pub(super) fn excuse(&mut self, floor: Instant) {
        self.heard = self.heard.max(floor);
        self.met = self.met.map(|met| met.max(floor));
    }

    /// Another process of the peer, or another pairing: nothing is known of what it sees.
    pub(super) const fn forget_peer(&mut self) {
        self.theirs = [RequestId(0); 2];
        self.met = None;
    }

    /// Whether it answered within `limit`.
    pub(super) fn is_well(&self, now: Instant, limit: Duration) -> bool {
        !self.foreign && now.since(self.heard) < limit
    }

    /// Whether the peer was met in the register within `limit`.
    pub(super) fn is_shared(&self, now: Instant, limit: Duration) -> bool {
        self.met.is_some_and(|met| now.since(met) < limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(100);

    fn at(ms: u64) -> Instant {
        Instant::from_millis(ms)
    }

    #[test]
    fn who_finds_what_the_peer_left_sees_the_same_register() {
        let mut witness = Witness::new(at(0));
        witness.peer_left(at(0), RequestId(7));
        assert!(!witness.is_shared(at(0), LIMIT));
        witness.read(at(10), RequestId(1), RequestId(7));
        assert!(witness.is_shared(at(10), LIMIT));
        // What the peer left since may be found before the peer is heard to say so.
        witness.read(at(150), RequestId(2), RequestId(8));
        assert!(!witness.is_shared(at(150), LIMIT));
        witness.peer_left(at(160), RequestId(8));
        assert!(witness.is_shared(at(160), LIMIT));
    }

    #[test]
    fn a_copy_of_the_register_does_not_grow_along() {
        let mut witness = Witness::new(at(0));
        witness.peer_left(at(0), RequestId(7));
        witness.read(at(0), RequestId(1), RequestId(7));
        for n in 1..10 {
            witness.peer_left(at(n * 40), RequestId(7 + n));
            witness.read(at(n * 40), RequestId(1 + n), RequestId(n));
        }
        assert!(!witness.is_shared(at(360), LIMIT));
    }
}
