//! Do both guests say the same? Asked of each conversation by itself.
//!
//! A connection agrees as far as both streams of bytes do, however they are numbered, cut or
//! repeated; datagrams agree one by one. A conversation that parts waits for the next checkpoint,
//! and its neighbours go on. One that keeps parting is not compared for a while (`pacing`).
//!
//! What is released is a frame of this host's guest, named by the tag that it came with. Within a
//! conversation tags come in the order in which the guest said them, except that segments that
//! say nothing new (acknowledgements, repetitions) do not wait for those that do.
//!
//! | file | holds |
//! |---|---|
//! | `stream.rs` | one TCP connection |
//! | `datagrams.rs` | one conversation of datagrams |
//! | `explain.rs` | [`Divergence`]: what differed, where, and the likely cause |
//! | `pacing.rs` | whether a flow is worth comparing |
//! | `patience.rs` | how long a frame waits for its match |
//! | `table.rs` | flows by key, least recently used first |

mod datagrams;
mod explain;
mod pacing;
mod patience;
mod report;
mod stream;
mod table;
#[cfg(test)]
mod tests;

use alloc::{boxed::Box, collections::BTreeSet, collections::VecDeque, vec::Vec};
use bytes::Bytes;
use core::time::Duration;

use datagrams::{Datagram, Datagrams, Frames};
pub use explain::{Difference, Divergence, EXCERPT, Totals};
use pacing::{Ended, FlowPace};
use patience::Latency;
pub use report::Report;
pub(crate) use stream::after;
use stream::{Parted, Stream, Taken};
pub(crate) use table::{Place, Table};

use super::packet::{Content, FlowKey, Fragments, Heading, Segment, View, flag};
use crate::{id::Epoch, time::Instant};

/// How far ahead of a connection's clock the other host is told, in ticks of that clock.
const CLOCK_AHEAD: u32 = 1 << 14;
/// How many of the least recently used flows are looked at for one that can be given up.
const LOOK_AT: usize = 64;
/// What a flow takes with its place in the table.
const FLOW: usize = size_of::<Flow>() + 64;

/// Bounds of a comparator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Limits {
    /// Most bytes held, with their bookkeeping. Half of it is for flows that hold nothing.
    pub bytes: usize,
    /// Bytes of virtio-net header before each frame.
    pub header: usize,
    /// A frame waits at least so long for its match.
    pub soonest: Duration,
    /// And at most so long.
    pub latest: Duration,
}

/// The comparator of all conversations.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Flows {
    limits: Limits,
    epoch: Epoch,
    /// When the other guest began to run.
    resumed: Instant,
    table: Table<Flow>,
    fragments: [Fragments; 2],
    /// Flows used since the checkpoint.
    spoke: Vec<Place>,
    held: usize,
    agreed: VecDeque<u64>,
    parted: VecDeque<Divergence>,
    totals: Totals,
    /// Frames of the other guest since the checkpoint.
    heard: u64,
    /// Of each flow the first of them that is not verified.
    unverified: BTreeSet<(u64, Place)>,
    deadlines: BTreeSet<(Instant, Place)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
struct Flow {
    body: Body,
    pace: FlowPace,
    latency: Latency,
    spoke: bool,
    /// Nothing more agrees before the next checkpoint.
    parted: bool,
    agreed: bool,
    armed: bool,
    /// The other host knows that the connection's clock may have come to this.
    clock: Option<u32>,
    unverified: Option<u64>,
    last: Option<Box<Divergence>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Body {
    Stream(Box<Stream>),
    Datagrams(Datagrams),
}

impl Default for Body {
    fn default() -> Self {
        Self::Datagrams(Datagrams::default())
    }
}

/// What a frame says, and in which conversation.
struct Said {
    key: FlowKey,
    frames: Frames,
    what: What,
}

enum What {
    Segment(Segment, Bytes),
    Datagram {
        body: Bytes,
        checksum: Option<usize>,
        strict: bool,
    },
}

impl Flows {
    /// Empty. The seed keys the table's hash.
    #[must_use]
    pub const fn new(limits: Limits, seed: u64) -> Self {
        Self {
            limits,
            epoch: Epoch(0),
            resumed: Instant::ZERO,
            table: Table::new(seed),
            fragments: [const { Fragments::new() }; 2],
            spoke: Vec::new(),
            held: 0,
            agreed: VecDeque::new(),
            parted: VecDeque::new(),
            totals: Totals::new(),
            heard: 0,
            unverified: BTreeSet::new(),
            deadlines: BTreeSet::new(),
        }
    }

    /// The epoch whose output is compared now.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// A frame of this host's guest, said since the checkpoint. What the other host has to know
    /// before the frame may leave is returned.
    pub fn ours(&mut self, now: Instant, tag: u64, frame: &Bytes) -> Option<Report> {
        let said = self.read(now, Heading::FromGuest, tag, frame)?;
        let Some(place) = self.place(&said) else {
            self.refuse(&said.key);
            return None;
        };
        let (epoch, key) = (self.epoch, said.key);
        let flow = &mut self.table[place];
        let before = flow.held();
        let compares = flow.compares();
        let mut report = None;
        let result = match (&mut flow.body, said.what) {
            (Body::Stream(stream), What::Segment(segment, payload)) => {
                report = Report::new(key, epoch, stream, &mut flow.clock, &segment);
                let tag = said.frames.as_slice().last().copied().unwrap_or(tag);
                let taken = if compares && !segment.options.signed {
                    stream.ours(now, &segment, payload, tag)
                } else {
                    Ok(stream.follow(&segment, payload.len()))
                };
                if taken == Ok(Taken::Nothing) {
                    self.agreed.push_back(tag);
                }
                // All fragments of a segment but the last go before it.
                taken.map(|_| ())
            }
            (
                Body::Datagrams(datagrams),
                What::Datagram {
                    body,
                    checksum,
                    strict,
                },
            ) => {
                if compares {
                    datagrams.ours(Datagram {
                        body,
                        checksum,
                        strict,
                        frames: said.frames,
                        since: now,
                    });
                }
                Ok(())
            }
            _ => Ok(()),
        };
        self.settle(now, place, before, result, None);
        report
    }

    /// A frame of the other guest, said since the checkpoint `epoch`; one from before the last
    /// checkpoint is ignored.
    pub fn theirs(&mut self, now: Instant, epoch: Epoch, frame: &Bytes) {
        if epoch != self.epoch {
            return;
        }
        let number = self.heard;
        self.heard += 1;
        let Some(said) = self.read(now, Heading::ToGuest, number, frame) else {
            return;
        };
        let Some(place) = self.place(&said) else {
            return self.refuse(&said.key);
        };
        let flow = &mut self.table[place];
        let before = flow.held();
        if !flow.compares() {
            return self.mark(place, Some(number));
        }
        let result = match (&mut flow.body, said.what) {
            (Body::Stream(stream), What::Segment(segment, payload)) => {
                stream.theirs(&segment, payload, number).map(|_| ())
            }
            (
                Body::Datagrams(datagrams),
                What::Datagram {
                    body,
                    checksum,
                    strict,
                },
            ) => {
                datagrams.theirs(Datagram {
                    body,
                    checksum,
                    strict,
                    frames: said.frames,
                    since: now,
                });
                Ok(())
            }
            _ => Ok(()),
        };
        self.settle(now, place, before, result, Some(number));
    }

    /// The other host holds the epoch: both guests start from the same state again, and everything
    /// that this one said before was released.
    pub fn commit(&mut self, now: Instant, epoch: Epoch) {
        for place in core::mem::take(&mut self.spoke) {
            let flow = &mut self.table[place];
            if core::mem::take(&mut flow.spoke) {
                flow.renew();
            }
        }
        self.fragments.iter_mut().for_each(Fragments::clear);
        self.agreed.clear();
        self.unverified.clear();
        self.deadlines.clear();
        (self.held, self.heard) = (0, 0);
        (self.epoch, self.resumed) = (epoch, now);
    }

    /// Output has left unseen: both guests count alike after a commit, from unknown numbers.
    pub fn lose_track(&mut self) {
        for place in self.table.by_age().collect::<Vec<_>>() {
            if let Body::Stream(stream) = &mut self.table[place].body {
                **stream = Stream::default();
            }
        }
    }

    /// The other host knows nothing of connections any more.
    pub fn forget_peer(&mut self) {
        for place in self.table.by_age().collect::<Vec<_>>() {
            self.table[place].clock = None;
        }
    }

    /// The next frame of this host's guest that both have said.
    pub fn agreed(&mut self) -> Option<u64> {
        self.agreed.pop_front()
    }

    /// The next conversation that parted: from there on, what it says waits for a checkpoint.
    pub fn parted(&mut self) -> Option<Divergence> {
        self.parted.pop_front()
    }

    /// How many of the other guest's first frames since the checkpoint have been said here too.
    #[must_use]
    pub fn accounted(&self) -> u64 {
        self.unverified.first().map_or(self.heard, |first| first.0)
    }

    /// When [`handle_timeout`](Self::handle_timeout) is due.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.deadlines.first().map(|first| first.0)
    }

    /// Finds conversations in which a frame has waited too long.
    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some((at, place)) = self.deadlines.first().copied()
            && at <= now
        {
            self.deadlines.pop_first();
            self.table[place].armed = false;
            match self.due(place) {
                Some(due) if due <= now => {
                    let parted = match &self.table[place].body {
                        Body::Datagrams(datagrams) => datagrams.parted(),
                        Body::Stream(_) => Parted::by(Difference::Unanswered),
                    };
                    let before = self.table[place].held();
                    self.settle(now, place, before, Err(parted), None);
                }
                Some(due) => self.arm(place, due),
                None => {}
            }
        }
    }

    /// The other guest runs from now on: what waits for it has waited since then.
    pub fn resumed(&mut self, now: Instant) {
        self.resumed = now;
    }

    /// Bytes held, with their bookkeeping.
    #[must_use]
    pub fn held(&self) -> usize {
        let fragments: usize = self.fragments.iter().map(Fragments::bytes).sum();
        self.held + fragments + self.table.len() * FLOW
    }

    /// Conversations known.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether no conversation is known.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.table.len() == 0
    }

    /// Divergences so far, by cause.
    #[must_use]
    pub const fn totals(&self) -> &Totals {
        &self.totals
    }

    /// The last divergence of each conversation that had one, newest conversation last.
    pub fn last_divergences(&self) -> impl Iterator<Item = &Divergence> {
        let places = self.table.by_age();
        places.filter_map(|place| self.table[place].last.as_deref())
    }

    // ---- reading ------------------------------------------------------------------------------

    /// What a frame says. `None` if it is a fragment of something that is not whole yet.
    fn read(&mut self, now: Instant, from: Heading, tag: u64, frame: &Bytes) -> Option<Said> {
        // Both are said by guests; which guest it is decides where fragments are kept.
        let side = usize::from(from == Heading::ToGuest);
        let heading = Heading::FromGuest;
        let opaque = Said {
            key: FlowKey::OPAQUE,
            frames: Frames::One(tag),
            what: What::Datagram {
                body: Bytes::new(),
                checksum: None,
                strict: true,
            },
        };
        let whole = |mut said: Said| {
            if let What::Datagram { body, .. } = &mut said.what {
                *body = frame.clone();
            }
            Some(said)
        };
        let Ok(view) = View::new(frame, self.limits.header, heading) else {
            return whole(opaque);
        };
        match view.content {
            Content::Other { .. } => whole(opaque),
            Content::Fragment(part) => {
                let body = frame.slice(view.transport..view.end);
                let whole = self.fragments[side].push(now, view.key, part, body, tag)?;
                let frames = Frames::Many(whole.tags);
                let Ok(view) = View::of_whole(whole.key, &whole.body, heading) else {
                    return Some(Said { frames, ..opaque });
                };
                Some(Said::new(&view, frames, &whole.body))
            }
            _ => Some(Said::new(&view, Frames::One(tag), frame)),
        }
    }

    fn place(&mut self, said: &Said) -> Option<Place> {
        let place = match self.table.find(&said.key) {
            Some(place) => place,
            None => {
                while (self.table.len() + 1) * FLOW > self.limits.bytes / 2 {
                    let is_idle = |place: &Place| self.table[*place].is_idle();
                    let idle = self.table.by_age().take(LOOK_AT).find(is_idle)?;
                    let key = self.table.key(idle);
                    self.table.remove(&key);
                }
                let body = match &said.what {
                    What::Segment(..) => Body::Stream(Box::default()),
                    What::Datagram { .. } => Body::default(),
                };
                self.table.insert(
                    said.key,
                    Flow {
                        body,
                        ..Flow::default()
                    },
                )
            }
        };
        let flow = &mut self.table[place];
        if !flow.spoke {
            flow.spoke = true;
            self.spoke.push(place);
        }
        Some(place)
    }

    /// A flow that there is no room to follow.
    fn refuse(&mut self, key: &FlowKey) {
        let divergence = self.explain(*key, 0, Parted::by(Difference::Overflow));
        self.tell(divergence);
    }

    // ---- after each frame ---------------------------------------------------------------------

    /// Counts, releases, and notices what came of a frame.
    fn settle(
        &mut self,
        now: Instant,
        place: Place,
        before: usize,
        result: Result<(), Parted>,
        heard: Option<u64>,
    ) {
        let flow = &mut self.table[place];
        let result = result.and_then(|()| flow.release(now, &mut self.agreed));
        self.held = self.held + flow.held() - before;
        let result = result.and_then(|()| {
            if self.held > self.limits.bytes / 2 {
                return Err(Parted::by(Difference::Overflow));
            }
            Ok(())
        });
        match result {
            Ok(()) => {
                let first = self.table[place].body.first_unverified();
                self.mark(place, first);
                if !self.table[place].armed
                    && let Some(due) = self.due(place)
                {
                    self.arm(place, due);
                }
            }
            Err(parted) => {
                let flow = &mut self.table[place];
                let first = flow.body.first_unverified().into_iter().chain(heard);
                let first = first.chain(flow.unverified).min();
                let offset = flow.body.verified();
                self.held -= flow.held();
                flow.give_up();
                self.mark(place, first);
                let divergence = self.explain(self.table.key(place), offset, parted);
                self.table[place].last = Some(Box::new(divergence.clone()));
                self.tell(divergence);
            }
        }
    }

    fn explain(&self, flow: FlowKey, offset: u64, parted: Parted) -> Divergence {
        Divergence {
            epoch: self.epoch,
            flow,
            offset,
            ours: parted.ours,
            theirs: parted.theirs,
            cause: parted.cause,
        }
    }

    fn tell(&mut self, divergence: Divergence) {
        self.totals.add(divergence.cause);
        // Whoever does not listen asks for one checkpoint all the same.
        if self.parted.len() < 64 {
            self.parted.push_back(divergence);
        }
    }

    /// Remembers the first frame of the other guest that the flow has not verified.
    fn mark(&mut self, place: Place, first: Option<u64>) {
        let flow = &mut self.table[place];
        let first = if flow.compares() {
            first
        } else {
            flow.unverified.or(first)
        };
        if flow.unverified == first {
            return;
        }
        if let Some(before) = core::mem::replace(&mut flow.unverified, first) {
            self.unverified.remove(&(before, place));
        }
        self.unverified.extend(first.map(|first| (first, place)));
    }

    fn due(&self, place: Place) -> Option<Instant> {
        let flow = &self.table[place];
        let since = flow.body.waits_since()?.max(self.resumed);
        let Limits {
            soonest, latest, ..
        } = self.limits;
        Some(flow.latency.due(since, soonest, latest))
    }

    fn arm(&mut self, place: Place, due: Instant) {
        self.table[place].armed = true;
        self.deadlines.insert((due, place));
    }
}

impl Said {
    fn new(view: &View, frames: Frames, bytes: &Bytes) -> Self {
        let payload = bytes.slice(view.payload());
        let what = match view.content {
            Content::Tcp(segment) => What::Segment(segment, payload),
            _ => What::Datagram {
                body: payload,
                checksum: view.checksum(),
                strict: false,
            },
        };
        Self {
            key: view.key,
            frames,
            what,
        }
    }
}

impl Flow {
    const fn compares(&self) -> bool {
        !self.parted && self.pace.compares()
    }

    fn held(&self) -> usize {
        match &self.body {
            Body::Stream(stream) => stream.held(),
            Body::Datagrams(datagrams) => datagrams.held(),
        }
    }

    /// Whether it can be given up: nothing waits, and both guests count it alike.
    fn is_idle(&self) -> bool {
        !self.spoke
            || (self.compares()
                && self.body.waits_since().is_none()
                && match &self.body {
                    Body::Stream(stream) => stream.counts_alike(),
                    Body::Datagrams(_) => true,
                })
    }

    fn release(&mut self, now: Instant, agreed: &mut VecDeque<u64>) -> Result<(), Parted> {
        match &mut self.body {
            Body::Stream(stream) => {
                while let Some((tag, since)) = stream.agreed() {
                    agreed.push_back(tag);
                    self.latency.took(now.since(since));
                    self.agreed = true;
                }
            }
            Body::Datagrams(datagrams) => {
                while let Some(datagram) = datagrams.agreed()? {
                    agreed.extend(datagram.frames.as_slice());
                    self.latency.took(now.since(datagram.since));
                    self.agreed = true;
                }
            }
        }
        Ok(())
    }

    fn give_up(&mut self) {
        self.parted = true;
        match &mut self.body {
            Body::Stream(stream) => stream.give_up(),
            Body::Datagrams(datagrams) => datagrams.give_up(),
        }
    }

    fn renew(&mut self) {
        let how = match (self.parted, self.agreed) {
            (true, _) => Ended::Diverged,
            (false, true) => Ended::Agreed,
            (false, false) => Ended::Open,
        };
        self.pace.ended(how);
        (self.parted, self.agreed, self.armed) = (false, false, false);
        self.unverified = None;
        match &mut self.body {
            Body::Stream(stream) => stream.renew(),
            Body::Datagrams(datagrams) => datagrams.give_up(),
        }
    }
}

impl Body {
    fn waits_since(&self) -> Option<Instant> {
        match self {
            Self::Stream(stream) => stream.waits_since(),
            Self::Datagrams(datagrams) => datagrams.waits_since(),
        }
    }

    fn first_unverified(&self) -> Option<u64> {
        match self {
            Self::Stream(stream) => stream.unverified().next(),
            Self::Datagrams(datagrams) => datagrams.unverified().next(),
        }
    }

    const fn verified(&self) -> u64 {
        match self {
            Self::Stream(stream) => stream.verified(),
            Self::Datagrams(_) => 0,
        }
    }
}
