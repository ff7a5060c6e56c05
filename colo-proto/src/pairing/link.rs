//! The channels of one pairing: which are up, what is sent, and what may not stand still.
//!
//! A link that is left says its last word first: Control drains, and what still arrives on it has
//! no meaning. Two things may not stand still: a phase that waits for the peer or for the guest side
//! ([`progress`](Link::progressed)), and frames that wait on Net.

use alloc::{string::String, vec::Vec};
use bytes::BytesMut;
use core::{num::NonZeroUsize, time::Duration};

use super::lane::{Item, Lane};
use crate::{
    config::Config,
    error::{Misuse, PeerFault},
    event::PeerLost,
    id::{Channel, Generation},
    machine::{Deadline, Demand, Sink, TimerKind, Transmit},
    member::BootId,
    output::FRAME_COST,
    time::Instant,
    wire::{Head, Kind, encode_reasons},
};

/// What a peer is told that does not take frames.
pub(crate) const FRAMES_STUCK: &str = "no frame was taken in time";

/// The channels of one pairing.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Link {
    lanes: Vec<Lane>,
    /// The peer's process, from its hello.
    pub(crate) peer: Option<BootId>,
    /// The ownership this pairing began under; stamped on every message.
    pub(crate) generation: Generation,
    /// Control is kept only until what is queued on it was sent, and no longer than this.
    draining: Option<Instant>,
    /// When something last moved in the current phase.
    progress: Instant,
    /// When a frame for the peer last moved, if any waits on Net.
    frames: Option<Instant>,
    stall: Duration,
    handshake: Duration,
    hold_bytes: usize,
}

impl Link {
    pub(crate) fn new(config: &Config, now: Instant) -> Self {
        Self {
            lanes: config.channels().map(Lane::new).collect(),
            peer: None,
            generation: Generation(0),
            draining: None,
            progress: now,
            frames: None,
            stall: config.stall,
            handshake: config.handshake,
            hold_bytes: config.hold_bytes,
        }
    }

    fn lane(&self, channel: Channel) -> Option<&Lane> {
        self.lanes.iter().find(|l| l.channel == channel)
    }

    fn lane_mut(&mut self, channel: Channel) -> Result<&mut Lane, Misuse> {
        self.lanes
            .iter_mut()
            .find(|l| l.channel == channel)
            .ok_or(Misuse::UnknownChannel(channel))
    }

    // ---- which channels are up ------------------------------------------------------------------

    pub(crate) fn is_up(&self, channel: Channel) -> bool {
        self.lane(channel).is_some_and(|l| l.up)
    }

    pub(crate) fn all_up(&self) -> bool {
        self.lanes.iter().all(|l| l.up)
    }

    pub(crate) fn any_up(&self) -> bool {
        self.lanes.iter().any(|l| l.up)
    }

    /// A connection begins; the draining of an older one is void.
    pub(crate) fn up(&mut self, channel: Channel) -> Result<(), Misuse> {
        self.changed(channel, true)
    }

    /// A connection ended.
    pub(crate) fn down(&mut self, channel: Channel) -> Result<(), Misuse> {
        self.changed(channel, false)
    }

    fn changed(&mut self, channel: Channel, up: bool) -> Result<(), Misuse> {
        self.draining = self.draining.filter(|_| channel != Channel::Control);
        self.lane_mut(channel)?.reset(up);
        Ok(())
    }

    /// Every channel is connected: one link of another wire carries them all.
    pub(crate) fn up_all(&mut self) {
        for lane in &mut self.lanes {
            lane.reset(true);
        }
    }

    /// Leaves the peer: gives the channels to be closed now.
    ///
    /// A driver stops asking for bytes once it is told to hang up, so Control goes only when its
    /// last message was taken, or when the link has shown that it takes nothing.
    pub(crate) fn hang_up(&mut self, now: Instant) -> Vec<Channel> {
        let mut closed = Vec::new();
        for lane in self.lanes.iter_mut().filter(|l| l.up) {
            if lane.channel == Channel::Control && lane.queued > 0 {
                self.draining = Some(now + self.handshake);
            } else {
                closed.push(lane.channel);
                lane.reset(false);
            }
        }
        if closed.contains(&Channel::Control) {
            self.draining = None;
        }
        self.peer = None;
        self.frames = None;
        closed
    }

    /// Whether Control is to be closed now: its last message was taken, or cannot be.
    pub(crate) fn has_drained(&mut self, now: Instant) -> bool {
        let flushed = self.lane(Channel::Control).is_none_or(Lane::is_flushed);
        let drained = self.draining.is_some_and(|until| now >= until || flushed);
        if drained {
            let _known = self.down(Channel::Control);
        }
        drained
    }

    /// Whether what arrives on the channel has no meaning any more: it is only kept until its
    /// last message was taken.
    pub(crate) fn is_draining(&self, channel: Channel) -> bool {
        self.draining.is_some() && channel == Channel::Control
    }

    // ---- what is sent ---------------------------------------------------------------------------

    pub(crate) const fn head(&self, kind: Kind, number: u64) -> Head {
        Head::new(kind, self.generation, number)
    }

    /// Queues a message; dropped if the channel is down (its end is being reported).
    pub(crate) fn send(&mut self, now: Instant, channel: Channel, head: Head, body: &[u8]) {
        let lane = self.lanes.iter_mut().find(|l| l.channel == channel && l.up);
        if let Some(lane) = lane {
            lane.send(head.with_body(body));
            if channel == Channel::Net {
                self.frames.get_or_insert(now);
            }
        }
    }

    /// Tells the peer why it is left ([`Kind::Leave`]) or not taken ([`Kind::Refuse`]), as far as it
    /// can still be told.
    pub(crate) fn send_reasons(&mut self, now: Instant, kind: Kind, why: &[String]) {
        let head = self.head(kind, 0);
        self.send(now, Channel::Control, head, &encode_reasons(why));
    }

    /// Bytes queued on a channel and not handed out.
    pub(crate) fn queued(&self, channel: Channel) -> usize {
        self.lane(channel).map_or(0, |l| l.queued)
    }

    /// Whether so many bytes more would wait for the peer on Net, which may not read for a while.
    pub(crate) fn net_is_full(&self, more: usize) -> bool {
        let held = self.lane(Channel::Net).map_or(0, Lane::held);
        held + more + FRAME_COST > self.hold_bytes
    }

    /// Hands out queued messages, several small ones at once.
    pub(crate) fn poll_queued(&mut self, channel: Channel, budget: usize) -> Option<Transmit> {
        let lane = self.lanes.iter_mut().find(|l| l.channel == channel)?;
        let transmit = lane.up.then(|| lane.poll(budget)).flatten()?;
        lane.handed_out(&transmit);
        Some(transmit)
    }

    /// Notes what was handed out besides.
    pub(crate) fn handed_out(&mut self, channel: Channel, transmit: &Transmit) {
        if let Ok(lane) = self.lane_mut(channel) {
            lane.handed_out(transmit);
        }
    }

    /// The kernel took bytes. A channel that went down may still report; that is no misuse.
    pub(crate) fn sent(
        &mut self,
        now: Instant,
        channel: Channel,
        n: NonZeroUsize,
    ) -> Result<(), Misuse> {
        let lane = self.lane_mut(channel)?;
        if lane.up {
            lane.sent(n)?;
        }
        if channel == Channel::Net {
            let waits = !lane.is_flushed();
            self.frames = waits.then_some(now);
        }
        self.moved(now, channel);
        Ok(())
    }

    // ---- what arrives ---------------------------------------------------------------------------

    pub(crate) fn demand(&self, channel: Channel) -> Demand {
        if self.is_draining(channel) {
            return Demand::Pause;
        }
        self.lane(channel).map_or(Demand::Pause, Lane::demand)
    }

    /// The small bytes that were demanded. `Ok(Ok(None))`: more is needed first.
    pub(crate) fn bytes(
        &mut self,
        channel: Channel,
        bytes: &[u8],
    ) -> Result<Result<Option<Item>, PeerFault>, Misuse> {
        self.lane_mut(channel)?.bytes(bytes)
    }

    pub(crate) fn placed(&mut self, channel: Channel, n: NonZeroUsize) -> Result<Item, Misuse> {
        self.lane_mut(channel)?.placed(n)
    }

    pub(crate) fn frame(&mut self, channel: Channel, frame: BytesMut) -> Result<Item, Misuse> {
        self.lane_mut(channel)?.frame(frame)
    }

    /// Answers [`Item::Contents`] and the table of [`Kind::Pages`]: where the contents go, if there
    /// are any.
    pub(crate) fn place(&mut self, channel: Channel, sink: Option<Sink>) {
        if let Ok(lane) = self.lane_mut(channel) {
            match sink {
                Some(sink) => lane.place(sink),
                None => lane.nothing_to_place(),
            }
        }
    }

    /// Whether contents are on their way into place, or about to be.
    pub(crate) fn placing(&self) -> bool {
        self.lanes.iter().any(Lane::placing)
    }

    /// A message of another ownership has nothing to say here.
    pub(crate) fn check_generation(&self, head: &Head) -> Result<(), PeerFault> {
        if head.generation == self.generation {
            return Ok(());
        }
        Err(PeerFault::OtherGeneration {
            message: head.kind.name(),
            got: head.generation,
            expected: self.generation,
        })
    }

    // ---- what may not stand still ---------------------------------------------------------------

    /// Something moved on a channel. Frames of clients do not count: no phase waits for them.
    pub(crate) fn moved(&mut self, now: Instant, channel: Channel) {
        if channel != Channel::Net {
            self.progress = now;
        }
    }

    /// The phase moved.
    pub(crate) const fn progressed(&mut self, now: Instant) {
        self.progress = now;
    }

    /// The deadline of a phase that must move.
    pub(crate) fn stall(&self) -> Deadline {
        Deadline {
            at: self.progress + self.stall,
            why: TimerKind::Stall,
        }
    }

    /// Whether a phase that must move has stood still for too long.
    pub(crate) fn stalled(&self, now: Instant, state: &'static str) -> Option<PeerLost> {
        let waited = now.since(self.progress);
        (waited >= self.stall).then_some(PeerLost::Faulty(PeerFault::Stalled { state, waited }))
    }

    /// Whether frames have waited on Net for too long, however lively the other channels are. What is
    /// full drops every client frame, and no phase would end it.
    pub(crate) fn frames_stuck(&self, now: Instant) -> Option<PeerLost> {
        let since = self.frames?;
        (now.since(since) >= self.stall).then_some(PeerLost::TooSlow(self.stall))
    }

    /// The deadlines of what drains and of frames.
    pub(crate) fn deadlines(&self) -> [Option<Deadline>; 2] {
        let draining = self.draining.map(|at| Deadline {
            at,
            why: TimerKind::Handshake,
        });
        let frames = self.frames.map(|since| Deadline {
            at: since + self.stall,
            why: TimerKind::Stall,
        });
        [draining, frames]
    }
}
