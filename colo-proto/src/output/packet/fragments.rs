//! Fragments put together for comparison. The fragments themselves leave as they came.

use alloc::{collections::VecDeque, vec::Vec};
use bytes::{Bytes, BytesMut};
use core::time::Duration;

use super::{FlowKey, Fragment};
use crate::time::Instant;

/// Most datagrams that are being put together.
const MOST: usize = 64;
/// Longest datagram.
const LONGEST: usize = 65_535;
/// Most parts of a datagram: the longest in pieces of 8 bytes is no datagram that anybody sends.
const PARTS: usize = 1024;
/// How long the parts of a datagram may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Datagrams of one side of which parts are missing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Fragments {
    partial: VecDeque<Partial>,
    bytes: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Partial {
    key: FlowKey,
    id: u32,
    since: Instant,
    parts: Vec<(usize, Bytes)>,
    len: Option<usize>,
    tags: Vec<u64>,
    cost: usize,
}

/// A datagram of which every part is here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Whole {
    /// The conversation, without ports.
    pub key: FlowKey,
    /// What the IP packet carried.
    pub body: Bytes,
    /// The tags of its fragments, in order of arrival.
    pub tags: Vec<u64>,
}

impl Fragments {
    /// None.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            partial: VecDeque::new(),
            bytes: 0,
        }
    }

    /// Takes a fragment. `None` while parts are missing.
    ///
    /// Parts that overlap, or go over a limit, are dropped with their datagram, as a receiver does
    /// (RFC 5722); their frames wait for the next checkpoint.
    pub fn push(
        &mut self,
        now: Instant,
        key: FlowKey,
        part: Fragment,
        body: Bytes,
        tag: u64,
    ) -> Option<Whole> {
        while self
            .partial
            .front()
            .is_some_and(|oldest| now.since(oldest.since) >= PATIENCE)
        {
            self.forget(0);
        }
        let same = |p: &Partial| p.key == key && p.id == part.id;
        let at = match self.partial.iter().position(same) {
            Some(at) => at,
            None => {
                if self.partial.len() >= MOST {
                    self.forget(0);
                }
                self.partial.push_back(Partial {
                    key,
                    id: part.id,
                    since: now,
                    parts: Vec::new(),
                    len: None,
                    tags: Vec::new(),
                    cost: 0,
                });
                self.partial.len() - 1
            }
        };
        let cost = body.len() + size_of::<(usize, Bytes)>() + size_of::<u64>();
        let partial = self.partial.get_mut(at)?;
        if !partial.take(part, body, tag) {
            self.forget(at);
            return None;
        }
        partial.cost += cost;
        self.bytes += cost;
        let done = partial.is_whole();
        if !done {
            return None;
        }
        let cost = partial.cost;
        let partial = self.partial.remove(at)?;
        self.bytes -= cost;
        Some(partial.join())
    }

    /// Bytes held.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.partial.clear();
        self.bytes = 0;
    }

    fn forget(&mut self, at: usize) {
        if let Some(gone) = self.partial.remove(at) {
            self.bytes -= gone.cost;
        }
    }
}

impl Partial {
    fn take(&mut self, part: Fragment, body: Bytes, tag: u64) -> bool {
        let end = part.offset.saturating_add(body.len());
        if end > LONGEST || self.parts.len() >= PARTS {
            return false;
        }
        if !part.more && *self.len.get_or_insert(end) != end {
            return false;
        }
        let at = self
            .parts
            .partition_point(|(offset, _)| *offset < part.offset);
        let before = at.checked_sub(1).and_then(|at| self.parts.get(at));
        let overlaps = before.is_some_and(|(offset, b)| offset + b.len() > part.offset)
            || self.parts.get(at).is_some_and(|(offset, _)| end > *offset);
        if overlaps {
            return false;
        }
        self.parts.insert(at, (part.offset, body));
        self.tags.push(tag);
        true
    }

    fn is_whole(&self) -> bool {
        let Some(len) = self.len else {
            return false;
        };
        let mut next = 0;
        for (offset, body) in &self.parts {
            if *offset != next {
                return false;
            }
            next += body.len();
        }
        next == len
    }

    fn join(self) -> Whole {
        let mut body = BytesMut::with_capacity(self.len.unwrap_or(0));
        for (_, part) in &self.parts {
            body.extend_from_slice(part);
        }
        Whole {
            key: self.key,
            body: body.freeze(),
            tags: self.tags,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::{Content, Heading, View, sample::Sample},
        *,
    };

    fn push(fragments: &mut Fragments, now: Instant, frame: &[u8], tag: u64) -> Option<Whole> {
        let view = View::new(frame, 0, Heading::FromGuest).unwrap();
        let Content::Fragment(part) = view.content else {
            panic!("{view:?}");
        };
        let body = Bytes::copy_from_slice(&frame[view.transport..view.end]);
        fragments.push(now, view.key, part, body, tag)
    }

    proptest! {
        #[test]
        fn parts_in_any_order_make_the_datagram(
            payload in prop::collection::vec(any::<u8>(), 1..400),
            order in Just((0u64..8).collect::<Vec<_>>()).prop_shuffle(),
        ) {
            let sample = Sample { protocol: 17, ..Sample::PLAIN };
            let body = sample.udp_body(&payload);
            let size = body.len().div_ceil(8).next_multiple_of(8);
            let parts: Vec<_> = body.chunks(size).collect();
            let mut fragments = Fragments::default();
            let mut whole = None;
            for &n in order.iter().filter(|n| (**n as usize) < parts.len()) {
                prop_assert!(whole.is_none());
                let offset = u16::try_from(n as usize * size / 8).unwrap();
                let more = n as usize + 1 < parts.len();
                // A datagram in one part is not fragmented at all.
                if parts.len() == 1 { return Ok(()); }
                let frame = sample.fragment(parts[n as usize], 9, offset, more);
                whole = push(&mut fragments, Instant::ZERO, &frame, n);
            }
            let whole = whole.unwrap();
            prop_assert_eq!(&whole.body[..], &body[..]);
            prop_assert_eq!(whole.tags.len(), parts.len());
            prop_assert_eq!(fragments.bytes(), 0);
            let view = View::of_whole(whole.key, &whole.body, Heading::FromGuest).unwrap();
            prop_assert_eq!((view.key.our_port, view.content), (80, Content::Udp));
        }
    }

    #[test]
    fn overlaps_floods_and_old_parts_are_forgotten() {
        let sample = Sample {
            protocol: 17,
            ..Sample::PLAIN
        };
        let mut fragments = Fragments::default();
        let at = |id, offset| sample.fragment(&[0; 16], id, offset, true);
        assert_eq!(push(&mut fragments, Instant::ZERO, &at(1, 0), 0), None);
        assert_eq!(push(&mut fragments, Instant::ZERO, &at(1, 1), 1), None);
        assert_eq!(fragments.bytes(), 0, "overlapping parts");
        for id in 0..200 {
            push(&mut fragments, Instant::ZERO, &at(id, 0), 0);
        }
        assert_eq!(fragments.partial.len(), MOST);
        push(&mut fragments, Instant::ZERO + PATIENCE, &at(9, 0), 0);
        assert_eq!(fragments.partial.len(), 1);
    }
}
