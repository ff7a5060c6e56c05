//! Datagrams of one conversation: each of this guest's, in order, against the next few of the other's.

use alloc::{collections::VecDeque, vec::Vec};
use bytes::Bytes;

use super::explain::{Difference, explain, first_difference};
use super::stream::Parted;
use crate::time::Instant;

/// How far datagrams of the other guest may be out of order.
const WINDOW: usize = 16;

/// What waits of both guests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Datagrams {
    ours: VecDeque<Datagram>,
    theirs: VecDeque<Datagram>,
    held: usize,
}

/// A datagram.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Datagram {
    pub(super) body: Bytes,
    /// Where two bytes are that do not count: its checksum.
    pub(super) checksum: Option<usize>,
    /// Whether the order counts too.
    pub(super) strict: bool,
    pub(super) frames: Frames,
    pub(super) since: Instant,
}

/// The frames that made up a datagram.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Frames {
    /// One.
    One(u64),
    /// Fragments.
    Many(Vec<u64>),
}

impl Frames {
    pub(super) fn as_slice(&self) -> &[u64] {
        match self {
            Self::One(tag) => core::slice::from_ref(tag),
            Self::Many(tags) => tags,
        }
    }
}

impl Datagram {
    fn cost(&self) -> usize {
        self.body.len() + size_of::<Self>() + size_of_val(self.frames.as_slice())
    }

    fn says_the_same(&self, other: &Self) -> bool {
        if self.body.len() != other.body.len() {
            return false;
        }
        let Some(at) = self.checksum else {
            return self.body == other.body;
        };
        let (a, b) = (&self.body[..], &other.body[..]);
        a.get(at + 2..) == b.get(at + 2..) && a.get(..at) == b.get(..at)
    }
}

impl Datagrams {
    pub(super) fn ours(&mut self, datagram: Datagram) {
        self.held += datagram.cost();
        self.ours.push_back(datagram);
    }

    pub(super) fn theirs(&mut self, datagram: Datagram) {
        self.held += datagram.cost();
        self.theirs.push_back(datagram);
    }

    /// The next datagram of this host's guest that both have said.
    pub(super) fn agreed(&mut self) -> Result<Option<Datagram>, Parted> {
        let Some(head) = self.ours.front() else {
            return Ok(None);
        };
        let window = if head.strict { 1 } else { WINDOW };
        let mut near = self.theirs.iter().take(window);
        let Some(at) = near.position(|other| head.says_the_same(other)) else {
            return if self.theirs.len() >= window {
                Err(self.parted())
            } else {
                Ok(None)
            };
        };
        if let Some(theirs) = self.theirs.remove(at) {
            self.held -= theirs.cost();
        }
        let ours = self.ours.pop_front();
        self.held -= ours.as_ref().map_or(0, Datagram::cost);
        Ok(ours)
    }

    /// How the heads differ.
    pub(super) fn parted(&self) -> Parted {
        let (Some(ours), Some(theirs)) = (self.ours.front(), self.theirs.front()) else {
            return Parted {
                cause: Difference::Unanswered,
                ours: Bytes::new(),
                theirs: Bytes::new(),
            };
        };
        let at = first_difference(&ours.body, &theirs.body);
        let (shown, other, mut cause) = explain(&ours.body, &theirs.body, at);
        let later = self.theirs.iter().any(|other| ours.says_the_same(other))
            || self.ours.iter().any(|other| other.says_the_same(theirs));
        if later {
            cause = Difference::Order;
        }
        Parted {
            cause,
            ours: shown,
            theirs: other,
        }
    }

    /// When the oldest that waits, of either guest, came.
    pub(super) fn waits_since(&self) -> Option<Instant> {
        let oldest = |queue: &VecDeque<Datagram>| queue.front().map(|d| d.since);
        match (oldest(&self.ours), oldest(&self.theirs)) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// The frames of the other guest that wait.
    pub(super) fn unverified(&self) -> impl Iterator<Item = u64> {
        self.theirs
            .iter()
            .flat_map(|d| d.frames.as_slice())
            .copied()
    }

    pub(super) const fn held(&self) -> usize {
        self.held
    }

    pub(super) fn give_up(&mut self) {
        *self = Self::default();
    }
}
