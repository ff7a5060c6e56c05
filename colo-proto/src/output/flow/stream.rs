//! One TCP connection: both guests' streams of bytes, compared by place.
//!
//! Each side is counted in its own sequence numbers. What is compared are places: how far a byte is
//! behind the next one that is not verified. So guests that chose different initial sequence
//! numbers, or cut the same bytes into other segments, agree.

use alloc::collections::VecDeque;
use bytes::{Buf, Bytes};

use super::explain::{Difference, explain, first_difference};
use crate::{
    output::packet::{Segment, flag},
    time::Instant,
};

/// A connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Stream {
    pub(super) ours: Side,
    pub(super) theirs: Side,
    pending: VecDeque<Pending>,
    /// Bytes verified so far.
    verified: u64,
}

/// One guest's half of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Side {
    /// The next number that is not verified.
    next: Option<u32>,
    pub(super) isn: Option<u32>,
    /// How often it was opened since the checkpoint.
    pub(super) opened: u32,
    /// What its SYN said, until that is verified.
    syn: Option<Syn>,
    /// Bytes that are not verified: in order, disjoint, none before `next`.
    pieces: VecDeque<Piece>,
    /// The number that its FIN takes.
    fin: Option<u32>,
    reset: bool,
    /// The end of all that it said.
    highest: Option<u32>,
    held: usize,
}

/// What must be equal of two SYN segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Syn {
    ack: Option<u32>,
    mss: Option<u16>,
    scale: Option<u8>,
    sack: bool,
    timestamps: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Piece {
    seq: u32,
    bytes: Bytes,
    /// The frame it came in.
    frame: u64,
    cost: usize,
}

/// A frame of this host's guest that is not verified to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Pending {
    tag: u64,
    /// `None`: a reset.
    end: Option<u32>,
    since: Instant,
}

/// What a segment is, and what came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// It says nothing that is not verified already.
    Nothing,
    /// It waits.
    Waits,
}

/// How the streams parted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Parted {
    pub(super) cause: Difference,
    pub(super) ours: Bytes,
    pub(super) theirs: Bytes,
}

impl Parted {
    pub(super) const fn by(cause: Difference) -> Self {
        Self {
            cause,
            ours: Bytes::new(),
            theirs: Bytes::new(),
        }
    }
}

const PIECE: usize = size_of::<Piece>();

impl Stream {
    /// A segment of this host's guest.
    pub(super) fn ours(
        &mut self,
        now: Instant,
        segment: &Segment,
        payload: Bytes,
        tag: u64,
    ) -> Result<Taken, Parted> {
        let end = self.ours.track(segment, payload.len());
        if segment.has(flag::SYN) && self.ours.open(segment) && !self.pending.is_empty() {
            return Err(Parted::by(Difference::Reopened));
        }
        if segment.has(flag::RST) {
            self.ours.reset = true;
            if self.both_reset() && self.pending.is_empty() {
                return Ok(Taken::Nothing);
            }
            self.wait(tag, None, now);
            return Ok(Taken::Waits);
        }
        if end == segment.seq {
            return Ok(Taken::Nothing);
        }
        if self.ours.next.is_none() {
            self.begin(segment.seq);
        }
        if self.ours.is_verified(end) {
            return Ok(Taken::Nothing);
        }
        self.ours.say(segment, payload, tag)?;
        self.wait(tag, Some(end), now);
        self.verify()?;
        Ok(Taken::Waits)
    }

    /// A segment of the other guest.
    pub(super) fn theirs(
        &mut self,
        segment: &Segment,
        payload: Bytes,
        frame: u64,
    ) -> Result<Taken, Parted> {
        let end = self.theirs.track(segment, payload.len());
        if segment.has(flag::SYN) {
            self.theirs.open(segment);
        }
        if segment.has(flag::RST) {
            self.theirs.reset = true;
            return Ok(Taken::Waits);
        }
        if end == segment.seq || self.theirs.is_verified(end) {
            return Ok(Taken::Nothing);
        }
        self.theirs.say(segment, payload, frame)?;
        self.verify()?;
        Ok(Taken::Waits)
    }

    /// Follows a segment that is not compared: where its guest is, and whether it says anything.
    pub(super) fn follow(&mut self, segment: &Segment, len: usize) -> Taken {
        let end = self.ours.track(segment, len);
        if segment.has(flag::SYN) {
            self.ours.open(segment);
        }
        if end == segment.seq && !segment.has(flag::RST) {
            Taken::Nothing
        } else {
            Taken::Waits
        }
    }

    /// The next frame of this host's guest that both have said, and since when it waited.
    pub(super) fn agreed(&mut self) -> Option<(u64, Instant)> {
        let front = *self.pending.front()?;
        let verified = match front.end {
            Some(end) => self.ours.is_verified(end),
            None => self.both_reset(),
        };
        if !verified {
            return None;
        }
        self.pending.pop_front();
        Some((front.tag, front.since))
    }

    /// When the oldest frame that waits came.
    pub(super) fn waits_since(&self) -> Option<Instant> {
        self.pending.front().map(|p| p.since)
    }

    /// The frames of the other guest of which something is not verified.
    pub(super) fn unverified(&self) -> impl Iterator<Item = u64> {
        self.theirs.pieces.iter().map(|piece| piece.frame)
    }

    /// Bytes verified.
    pub(super) const fn verified(&self) -> u64 {
        self.verified
    }

    /// Bytes held on both sides, with their bookkeeping.
    pub(super) fn held(&self) -> usize {
        self.ours.held + self.theirs.held + self.pending.len() * size_of::<Pending>()
    }

    /// Gives up what waits: it is not compared any more before the next checkpoint.
    pub(super) fn give_up(&mut self) {
        self.pending.clear();
        self.ours.forget();
        self.theirs.forget();
    }

    /// The other guest starts from this one's state: everything said so far is common.
    pub(super) fn renew(&mut self) {
        self.give_up();
        self.pending = VecDeque::new();
        let ours = Side {
            next: self.ours.highest,
            isn: self.ours.isn,
            highest: self.ours.highest,
            ..Side::default()
        };
        self.theirs = ours.clone();
        self.ours = ours;
    }

    /// Whether nothing waits and both guests use the same numbers.
    pub(super) fn counts_alike(&self) -> bool {
        let idle = self.pending.is_empty() && self.theirs.pieces.is_empty();
        idle && (self.ours.next == self.theirs.next || self.both_reset())
    }

    fn both_reset(&self) -> bool {
        self.ours.reset && self.theirs.reset && self.ours.opened == self.theirs.opened
    }

    /// The connection was open before the first checkpoint: both count alike.
    fn begin(&mut self, seq: u32) {
        self.ours.next = Some(seq);
        if self.theirs.next.is_none() {
            self.theirs.next = Some(seq);
            self.theirs.clip();
        }
    }

    fn wait(&mut self, tag: u64, end: Option<u32>, since: Instant) {
        self.pending.push_back(Pending { tag, end, since });
    }

    /// Compares as far as both have spoken.
    fn verify(&mut self) -> Result<(), Parted> {
        let (ours, theirs) = (&mut self.ours, &mut self.theirs);
        if ours.opened != theirs.opened {
            return Ok(());
        }
        if let Some(syn) = ours.syn {
            let Some(other) = theirs.syn else {
                return Ok(());
            };
            if syn != other {
                return Err(Parted::by(Difference::Options));
            }
            ours.opens();
            theirs.opens();
        }
        loop {
            let (first, other) = (ours.first(), theirs.first());
            if let (Some(a), Some(b)) = (first, other) {
                let n = a.len().min(b.len());
                if a[..n] != b[..n] {
                    let at = first_difference(a, b);
                    let (shown, other, cause) = explain(a, b, at);
                    self.verified += at as u64;
                    return Err(Parted {
                        cause,
                        ours: shown,
                        theirs: other,
                    });
                }
                ours.verify(n);
                theirs.verify(n);
                self.verified += n as u64;
                continue;
            }
            match (ours.ends(), theirs.ends()) {
                (true, true) => {
                    ours.closes();
                    theirs.closes();
                }
                (true, false) if other.is_some() => return Err(Parted::by(Difference::End)),
                (false, true) if first.is_some() => return Err(Parted::by(Difference::End)),
                _ => return Ok(()),
            }
        }
    }
}

impl Side {
    /// Where the segment ends, its SYN and FIN counted.
    fn track(&mut self, segment: &Segment, len: usize) -> u32 {
        let numbers = u32::from(segment.has(flag::SYN)) + u32::from(segment.has(flag::FIN));
        // A frame is shorter than 2^32.
        let end = segment.seq.wrapping_add(len as u32).wrapping_add(numbers);
        let opens = segment.has(flag::SYN) && self.isn != Some(segment.seq);
        let newer = self.highest.is_none_or(|highest| after(end, highest));
        if opens || (newer && !segment.has(flag::RST)) {
            self.highest = Some(end);
        }
        end
    }

    /// A SYN. True if it is not one said again.
    fn open(&mut self, segment: &Segment) -> bool {
        if self.isn == Some(segment.seq) {
            return false;
        }
        let options = &segment.options;
        *self = Self {
            next: Some(segment.seq),
            isn: Some(segment.seq),
            opened: self.opened.wrapping_add(1),
            syn: Some(Syn {
                ack: segment.ack,
                mss: options.mss,
                scale: options.scale,
                sack: options.sack_permitted,
                timestamps: options.timestamp.is_some(),
            }),
            highest: self.highest,
            ..Self::default()
        };
        true
    }

    fn is_verified(&self, end: u32) -> bool {
        self.next.is_some_and(|next| !after(end, next))
    }

    /// Keeps what the segment says and was not said before.
    fn say(&mut self, segment: &Segment, payload: Bytes, frame: u64) -> Result<(), Parted> {
        let first = segment.seq.wrapping_add(u32::from(segment.has(flag::SYN)));
        let end = first.wrapping_add(payload.len() as u32);
        if segment.has(flag::FIN) && self.next.is_none_or(|next| !after(next, end)) {
            self.fin = Some(end);
        }
        let mut piece = Piece {
            seq: first,
            cost: payload.len() + PIECE,
            bytes: payload,
            frame,
        };
        if let Some(next) = self.next
            && !piece.skip_to(next)
        {
            return Ok(());
        }
        match self.pieces.back() {
            Some(last) if after(last.end(), piece.seq) => self.mend(piece),
            _ => {
                self.keep(self.pieces.len(), piece);
                Ok(())
            }
        }
    }

    /// Fits in a piece that does not come after all others: what is here already must be the same.
    fn mend(&mut self, mut piece: Piece) -> Result<(), Parted> {
        let mut at = 0;
        while let Some(here) = self.pieces.get(at) {
            if after(here.seq, piece.seq) {
                // The part before it is new.
                let room = here.seq.wrapping_sub(piece.seq) as usize;
                let gap = room.min(piece.bytes.len());
                let mut new = piece.clone();
                new.bytes.truncate(gap);
                piece.advance(gap);
                self.keep(at, new);
                at += 1;
                if piece.bytes.is_empty() {
                    return Ok(());
                }
                continue;
            }
            let skip = piece.seq.wrapping_sub(here.seq) as usize;
            let common = here.bytes.get(skip..).unwrap_or_default();
            let n = common.len().min(piece.bytes.len());
            if common[..n] != piece.bytes[..n] {
                let at = first_difference(common, &piece.bytes);
                let (ours, theirs, _) = explain(common, &piece.bytes, at);
                return Err(Parted {
                    cause: Difference::Resent,
                    ours,
                    theirs,
                });
            }
            piece.advance(n);
            if piece.bytes.is_empty() {
                return Ok(());
            }
            at += 1;
        }
        self.keep(at, piece);
        Ok(())
    }

    fn keep(&mut self, at: usize, piece: Piece) {
        if !piece.bytes.is_empty() {
            self.held += piece.cost;
            self.pieces.insert(at, piece);
        }
    }

    /// Drops what is before `next`.
    fn clip(&mut self) {
        let Some(next) = self.next else {
            return;
        };
        for mut piece in core::mem::take(&mut self.pieces) {
            self.held -= piece.cost;
            if piece.skip_to(next) {
                self.keep(self.pieces.len(), piece);
            }
        }
        self.fin = self.fin.filter(|fin| !after(next, *fin));
    }

    /// The bytes at `next`, as far as they are contiguous in one piece.
    fn first(&self) -> Option<&[u8]> {
        let piece = self.pieces.front()?;
        (Some(piece.seq) == self.next && self.syn.is_none()).then_some(&piece.bytes)
    }

    fn verify(&mut self, n: usize) {
        if let Some(piece) = self.pieces.front_mut() {
            piece.advance(n);
            self.next = Some(piece.seq);
            if piece.bytes.is_empty() {
                self.held -= piece.cost;
                self.pieces.pop_front();
            }
        }
    }

    fn opens(&mut self) {
        self.syn = None;
        self.next = self.next.map(|next| next.wrapping_add(1));
    }

    fn ends(&self) -> bool {
        self.fin.is_some() && self.fin == self.next
    }

    fn closes(&mut self) {
        self.fin = None;
        self.next = self.next.map(|next| next.wrapping_add(1));
    }

    fn forget(&mut self) {
        self.pieces = VecDeque::new();
        self.held = 0;
    }
}

impl Piece {
    fn end(&self) -> u32 {
        self.seq.wrapping_add(self.bytes.len() as u32)
    }

    fn advance(&mut self, n: usize) {
        self.bytes.advance(n.min(self.bytes.len()));
        self.seq = self.seq.wrapping_add(n as u32);
    }

    /// Drops what is before `next`. False if nothing is left.
    fn skip_to(&mut self, next: u32) -> bool {
        if after(next, self.seq) {
            self.advance(next.wrapping_sub(self.seq) as usize);
        }
        !self.bytes.is_empty()
    }
}

/// Whether one sequence number is after another.
pub(crate) const fn after(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) > 0
}
