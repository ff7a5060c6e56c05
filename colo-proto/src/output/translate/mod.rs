//! Numbers that the world knows, and numbers that the guest here uses.
//!
//! Two guests choose different initial sequence numbers and clocks for the same connection. While
//! this host shadows, what clients acknowledge is translated for the guest here. After a takeover
//! what the guest says is translated too, until its connections end, whoever is the secondary by
//! then: what a [`Translator`] knows of them outlives takeovers and is [handed on](Translator::lasting).
//!
//! | a connection is | when | what is moved |
//! |---|---|---|
//! | half known | one guest's number is known; after the other guest's, clients' acknowledgements wait | nothing yet |
//! | live | both are known | by the difference |
//! | identical | a checkpoint was loaded, or the guests never chose | nothing |
//! | closing | it was reset, or closed both ways | as before, for a minute |
//!
//! The difference is set once for each time that a connection is opened: by counting how often
//! each guest has opened it since the checkpoint, not by guessing from what clients say.

mod shift;
#[cfg(test)]
mod tests;

use alloc::{collections::VecDeque, vec::Vec};
use bytes::Bytes;
use core::time::Duration;

pub use shift::{Shift, Tcp};

use super::{
    flow::{Place, Report, Table, after},
    packet::{FlowKey, Heading, Segment, flag},
};
use crate::{id::Epoch, time::Instant};

/// Most connections known.
const MOST: usize = 65_536;
/// Most reports of a checkpoint that is not loaded yet, and most client segments that wait after a
/// takeover.
const WAITING: usize = 4096;
/// How long a connection that is closing is remembered, and one that says nothing.
const CLOSING: Duration = Duration::from_secs(60);
const SILENT: Duration = Duration::from_secs(2 * 60 * 60);

/// What is known of connections.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Translator {
    header: usize,
    table: Table<Entry>,
    epoch: Epoch,
    /// The guest here is the VM.
    serves: bool,
    /// Connections with something that the next checkpoint makes void.
    opened: Vec<FlowKey>,
    early: VecDeque<Report>,
    /// Client segments that acknowledge what the guest here has not said yet.
    waiting: VecDeque<(FlowKey, u64, Bytes)>,
    /// Those that it has said meanwhile.
    ready: VecDeque<(u64, Bytes)>,
}

/// One connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Entry {
    lasting: Shift,
    /// The initial number of the guest's that `lasting` belongs to.
    isn: Option<u32>,
    wire: Opened,
    guest: Opened,
    /// No timestamp of the other guest's that has left is after this.
    clock: Option<u32>,
    /// The first timestamp that leaves must be after this.
    floor: Option<u32>,
    used: Instant,
    /// The guest, and the client, have closed it.
    closed: [bool; 2],
    waits: u32,
}

/// How often a guest has opened a connection since the checkpoint, and how the last time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Opened {
    count: u32,
    isn: u32,
    stamp: Option<u32>,
}

/// A connection whose numbers are translated for good: what another secondary must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lasting {
    /// The connection.
    pub flow: FlowKey,
    /// How far the guest's numbers are ahead.
    pub shift: Shift,
    /// The guest's initial sequence number, if it is known.
    pub isn: Option<u32>,
}

impl Lasting {
    /// Bytes of it on the wire.
    pub const BYTES: usize = FlowKey::BYTES + 13;

    /// It as bytes.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        let numbers = [self.shift.seq, self.shift.stamp, self.isn.unwrap_or(0)];
        let fields = self
            .flow
            .to_bytes()
            .into_iter()
            .chain([u8::from(self.isn.is_some())])
            .chain(numbers.into_iter().flat_map(u32::to_le_bytes));
        out.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
        out
    }

    /// What these bytes are.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let (key, rest) = bytes.split_at(FlowKey::BYTES);
        let mut flow = [0; FlowKey::BYTES];
        flow.copy_from_slice(key);
        let (known, numbers) = rest.split_at(1);
        let mut words = numbers.chunks(4).map(|word| {
            let bytes = word.iter().rev();
            bytes.fold(0u32, |value, byte| value << 8 | u32::from(*byte))
        });
        let mut next = || words.next().unwrap_or(0);
        let (seq, stamp, isn) = (next(), next(), next());
        Self {
            flow: FlowKey::from_bytes(&flow),
            shift: Shift { seq, stamp },
            isn: Some(isn).filter(|_| known == [1]),
        }
    }
}

impl Translator {
    /// Of a host that shadows; frames begin with `header` bytes of virtio-net header.
    #[must_use]
    pub const fn new(header: usize, seed: u64) -> Self {
        Self {
            header,
            table: Table::new(seed),
            epoch: Epoch(0),
            serves: false,
            opened: Vec::new(),
            early: VecDeque::new(),
            waiting: VecDeque::new(),
            ready: VecDeque::new(),
        }
    }

    /// The other host's guest chose numbers, or its clock went on.
    pub fn report(&mut self, now: Instant, report: Report) {
        if report.epoch > self.epoch {
            if self.early.len() < WAITING {
                self.early.push_back(report);
            }
            return;
        }
        if report.epoch == self.epoch {
            self.take(now, &report);
        }
    }

    /// A frame of the guest here.
    #[must_use]
    pub fn from_guest(&mut self, now: Instant, frame: Bytes) -> Bytes {
        let Some(tcp) = self.find(&frame, Heading::FromGuest) else {
            return frame;
        };
        if let Some(segment) = &tcp.segment
            && segment.has(flag::SYN)
        {
            self.opens(now, tcp.flow, segment);
        }
        let Some(place) = self.table.find(&tcp.flow).filter(|_| self.serves) else {
            return frame;
        };
        let entry = &mut self.table[place];
        entry.used = now;
        if let Some(segment) = &tcp.segment {
            entry.closes(segment, 0);
            if let Some(stamp) = segment.options.timestamp {
                entry.keeps_up(stamp.value);
            }
        }
        let shift = entry.lasting;
        shift.apply(&tcp, Heading::FromGuest, frame)
    }

    /// A client's frame for the guest here. `None` if it acknowledges what the guest has not said
    /// yet; it [comes](Self::poll_ready) when the guest has.
    #[must_use]
    pub fn to_guest(&mut self, now: Instant, index: u64, frame: Bytes) -> Option<Bytes> {
        let Some(tcp) = self.find(&frame, Heading::ToGuest) else {
            return Some(frame);
        };
        let Some(place) = self.table.find(&tcp.flow) else {
            return Some(frame);
        };
        let serves = self.serves;
        let entry = &mut self.table[place];
        entry.used = now;
        let opens = tcp
            .segment
            .is_some_and(|s| s.has(flag::SYN) && s.ack.is_none());
        if !opens && (entry.waits > 0 || entry.wire.count > entry.guest.count) {
            if serves && self.waiting.len() >= WAITING {
                // As if the wire had lost it.
                return None;
            }
            entry.waits += 1;
            self.waiting.push_back((tcp.flow, index, frame));
            return None;
        }
        if let Some(segment) = &tcp.segment {
            entry.closes(segment, 1);
        }
        let shift = entry.shift(serves);
        Some(shift.apply(&tcp, Heading::ToGuest, frame))
    }

    /// The next client's frame that waited and can be given now.
    pub fn poll_ready(&mut self) -> Option<(u64, Bytes)> {
        self.ready.pop_front()
    }

    /// A checkpoint is loaded: the guest here uses the other's numbers. Client frames that waited
    /// are given again by whoever stores them.
    pub fn commit(&mut self, now: Instant, epoch: Epoch) {
        self.epoch = epoch;
        self.waiting.clear();
        self.ready.clear();
        for flow in core::mem::take(&mut self.opened) {
            let Some(place) = self.table.peek(&flow) else {
                continue;
            };
            let entry = &mut self.table[place];
            (entry.wire, entry.guest, entry.waits) = Default::default();
            if entry.lasting == Shift::NONE && entry.clock.is_none() {
                self.table.remove(&flow);
            }
        }
        for report in core::mem::take(&mut self.early) {
            self.report(now, report);
        }
    }

    /// The guest here is the VM now. What the world knows of its connections stays as it is.
    pub fn take_over(&mut self) {
        self.serves = true;
        self.early.clear();
        let places: Vec<Place> = self.table.by_age().collect();
        for &place in &places {
            // The other guest's clock left as the world knows that guest's numbers.
            let entry = &mut self.table[place];
            let before = entry.lasting.stamp;
            entry.floor = entry.clock.take().map(|clock| clock.wrapping_sub(before));
        }
        for flow in core::mem::take(&mut self.opened) {
            if let Some(place) = self.table.peek(&flow) {
                self.table[place].settle();
            }
        }
        for place in places {
            let entry = &self.table[place];
            if entry.is_void() {
                let flow = self.table.key(place);
                self.table.remove(&flow);
            }
        }
    }

    /// The VM is elsewhere: nothing of this guest's connections means anything.
    pub fn clear(&mut self) {
        *self = Self::new(self.header, self.table.seed());
    }

    /// Connections whose numbers are moved for good.
    pub fn lasting(&self) -> impl Iterator<Item = Lasting> {
        self.table.by_age().filter_map(|place| {
            let Entry { lasting, isn, .. } = self.table[place];
            (lasting != Shift::NONE).then(|| Lasting {
                flow: self.table.key(place),
                shift: lasting,
                isn,
            })
        })
    }

    /// Takes what another host knows for good of the guest's connections.
    pub fn inherit(&mut self, now: Instant, lasting: Lasting) {
        let place = self.place(now, lasting.flow);
        let entry = &mut self.table[place];
        (entry.lasting, entry.isn) = (lasting.shift, lasting.isn);
    }

    /// Connections known.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether there is nothing to translate.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.table.len() == 0
    }

    // ---- connections --------------------------------------------------------------------------

    fn find(&self, frame: &[u8], heading: Heading) -> Option<Tcp> {
        if self.serves && self.is_empty() {
            return None;
        }
        let tcp = Tcp::find(frame, self.header, heading)?;
        // A signed segment cannot be changed.
        let signed = tcp.segment.is_some_and(|s| s.options.signed);
        (!signed).then_some(tcp)
    }

    fn take(&mut self, now: Instant, report: &Report) {
        let place = self.place(now, report.flow);
        let entry = &mut self.table[place];
        if let Some(isn) = report.isn {
            if entry.isn != Some(isn) {
                // Another connection on the same addresses and ports.
                (entry.lasting, entry.isn, entry.clock) = Default::default();
            }
            entry.wire = Opened {
                count: report.opened,
                isn,
                stamp: report.stamp,
            };
            entry.closed = [false; 2];
        }
        if let Some(clock) = report.clock
            && entry.clock.is_none_or(|known| after(clock, known))
        {
            entry.clock = Some(clock);
        }
        self.opened.push(report.flow);
        self.flush(now, place);
    }

    /// The guest here opens a connection.
    fn opens(&mut self, now: Instant, flow: FlowKey, segment: &Segment) {
        let known = self.table.peek(&flow).map(|place| self.table[place]);
        let again = known.is_some_and(|entry| {
            entry.isn == Some(segment.seq)
                || (entry.guest.count > 0 && entry.guest.isn == segment.seq)
        });
        if again {
            return;
        }
        if self.serves && known.is_none_or(|entry| entry.wire.count <= entry.guest.count) {
            // A connection that only this guest has ever had.
            self.table.remove(&flow);
            return;
        }
        let place = self.place(now, flow);
        let entry = &mut self.table[place];
        entry.guest = Opened {
            count: entry.guest.count.wrapping_add(1),
            isn: segment.seq,
            stamp: segment.options.timestamp.map(|stamp| stamp.value),
        };
        entry.closed = [false; 2];
        if self.serves && entry.is_live() {
            entry.settle();
        }
        self.opened.push(flow);
        self.flush(now, place);
    }

    /// Client frames that waited for the guest to open the connection follow now, in order.
    fn flush(&mut self, now: Instant, place: Place) {
        let entry = &mut self.table[place];
        if entry.waits == 0 || entry.wire.count > entry.guest.count {
            return;
        }
        entry.waits = 0;
        let flow = self.table.key(place);
        let waiting = core::mem::take(&mut self.waiting);
        let (ours, others): (VecDeque<_>, _) = waiting.into_iter().partition(|w| w.0 == flow);
        self.waiting = others;
        for (_, index, frame) in ours {
            if let Some(frame) = self.to_guest(now, index, frame) {
                self.ready.push_back((index, frame));
            }
        }
    }

    fn place(&mut self, now: Instant, flow: FlowKey) -> Place {
        if let Some(place) = self.table.find(&flow) {
            self.table[place].used = now;
            return place;
        }
        while let Some(oldest) = self.table.oldest() {
            let entry = &self.table[oldest];
            if self.table.len() < MOST && now.since(entry.used) < entry.patience() {
                break;
            }
            let gone = self.table.key(oldest);
            self.table.remove(&gone);
        }
        let entry = Entry {
            used: now,
            ..Entry::default()
        };
        self.table.insert(flow, entry)
    }
}

impl Entry {
    const fn is_live(&self) -> bool {
        self.wire.count > 0 && self.wire.count == self.guest.count
    }

    /// What the two guests' numbers differ by, since the checkpoint.
    fn difference(&self) -> Shift {
        if !self.is_live() {
            return Shift::NONE;
        }
        let stamps = self.guest.stamp.zip(self.wire.stamp);
        Shift {
            seq: self.guest.isn.wrapping_sub(self.wire.isn),
            stamp: stamps.map_or(0, |(guest, wire)| guest.wrapping_sub(wire)),
        }
    }

    fn shift(&self, serves: bool) -> Shift {
        if serves {
            self.lasting
        } else {
            self.difference()
        }
    }

    /// The guest here is the VM: what differs now does so until the connection ends.
    fn settle(&mut self) {
        if self.is_live() {
            // What was opened since the checkpoint has no older shift.
            self.lasting = self.difference();
            self.isn = Some(self.guest.isn);
        } else if self.guest.count > self.wire.count {
            // The world has never heard of it.
            (self.lasting, self.isn, self.floor) = Default::default();
        } else if self.wire.count > self.guest.count {
            // The guest here is about to open it, as the other did.
            return;
        }
        (self.wire, self.guest) = Default::default();
    }

    /// The first timestamp after a takeover may not go back behind one that has left.
    fn keeps_up(&mut self, stamp: u32) {
        if let Some(floor) = self.floor.take() {
            let leaves = stamp.wrapping_sub(self.lasting.stamp);
            if !after(leaves, floor) {
                let behind = floor.wrapping_sub(leaves).wrapping_add(1);
                self.lasting.stamp = self.lasting.stamp.wrapping_sub(behind);
            }
        }
    }

    fn closes(&mut self, segment: &Segment, side: usize) {
        if segment.has(flag::RST) {
            self.closed = [true; 2];
        } else if segment.has(flag::FIN) {
            self.closed[side] = true;
        }
    }

    fn patience(&self) -> Duration {
        if self.closed == [true; 2] {
            CLOSING
        } else {
            SILENT
        }
    }

    fn is_void(&self) -> bool {
        self.lasting == Shift::NONE && self.floor.is_none() && self.wire.count <= self.guest.count
    }
}
