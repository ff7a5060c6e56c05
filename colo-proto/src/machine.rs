//! The contract that both roles keep with whoever drives them.
//!
//! # The drain contract
//!
//! 1. One [`handle_input`](Machine::handle_input).
//! 2. [`poll_output`](Machine::poll_output) until `None`, executing each. What executing produces
//!    is queued by the driver and becomes a later input; it is never nested.
//! 3. For every writable channel, [`poll_transmit`](Machine::poll_transmit) until `None` or the
//!    socket is full.
//! 4. For every channel, do what [`poll_demand`](Machine::poll_demand) says as bytes arrive.
//! 5. Arm one timer from [`poll_timeout`](Machine::poll_timeout).
//! 6. Wait. Waking early is harmless.
//!
//! A debug build panics when step 1 follows step 1 with outputs left: a driver that forgets
//! outputs would release, pause or fence too late, and that must not pass a test unseen.
//!
//! ```no_run
//! # use colo_proto::{machine::{Machine, Input}, time::Instant};
//! # fn now() -> Instant { Instant::ZERO }
//! # fn wait() -> Input<'static> { Input::Timeout }
//! # fn execute(_: colo_proto::machine::Output) {}
//! # fn drive(mut machine: impl Machine) -> Result<(), colo_proto::error::Misuse> {
//! loop {
//!     machine.handle_input(now(), wait())?;
//!     while let Some(output) = machine.poll_output() {
//!         execute(output);
//!     }
//!     // poll_transmit, poll_demand, poll_timeout ...
//! }
//! # }
//! ```

use core::{num::NonZeroUsize, ops::Range, time::Duration};

use bytes::{Bytes, BytesMut};

use crate::{
    command::{Answer, Command, CommandId},
    error::Misuse,
    event::Event,
    id::{Channel, Epoch, PageRuns, Slot},
    member::{
        Ballot, DATAGRAM_SIZE, Health, PathId, Permit, PersistId, Record, RequestId, Verdict,
    },
    stats::Stats,
    status::Status,
    time::Instant,
};

pub use crate::operation::{Captured, GuestDone, GuestOp, GuestOpKind, ReplicationOp};

/// A protocol machine: everything that happens to it is an argument, everything it wants done is
/// handed out. See the [module documentation](self) for the order of calls.
pub trait Machine {
    /// Every channel that it knows, Control first. The same for all its life: the driver connects
    /// and accepts these and no others.
    fn channels(&self) -> alloc::vec::Vec<Channel>;

    /// Tells the machine that something happened at `now`.
    ///
    /// # Errors
    /// [`Misuse`] when the *driver* broke the contract. The machine's state is unchanged then. A
    /// peer's faults are never an `Err`; they become an [`Event`].
    fn handle_input(&mut self, now: Instant, input: Input<'_>) -> Result<(), Misuse>;

    /// The next thing to do, in order.
    fn poll_output(&mut self) -> Option<Output>;

    /// The next message for `channel`, of about `budget` bytes at most (a message that cannot be
    /// cut may be larger). Ask only when the socket has room: what was handed out must be sent,
    /// in order, and reported with [`Input::Sent`] as the kernel takes it.
    fn poll_transmit(&mut self, channel: Channel, budget: usize) -> Option<Transmit>;

    /// What the next bytes of `channel` are for. Asking again before it is met gives the same
    /// answer.
    fn poll_demand(&mut self, channel: Channel) -> Demand;

    /// When to call with [`Input::Timeout`], and why.
    fn poll_timeout(&self) -> Option<Deadline>;

    /// Counters and times, plain data.
    fn stats(&self) -> Stats;

    /// What an operator wants to know, in QEMU's terms and ours.
    fn status(&self) -> Status;
}

/// Something that happened.
#[derive(Debug)]
#[non_exhaustive]
pub enum Input<'a> {
    /// The deadline passed. Early and spurious ones are harmless.
    Timeout,
    /// The channel is connected, joined and authenticated.
    Up(Channel),
    /// The channel is gone, or could not be connected.
    Down(Channel),
    /// The `then` bytes of a [`Demand::Read`].
    Bytes(Channel, &'a [u8]),
    /// The `place` bytes of a [`Demand::Read`] are where they belong, all of them. Comes before
    /// the `Bytes` of the same demand.
    Placed(Channel, NonZeroUsize),
    /// Answers [`Demand::Frame`]: the whole frame, given away.
    Frame(Channel, BytesMut),
    /// The kernel took this many bytes of what [`Machine::poll_transmit`] handed out.
    Sent(Channel, NonZeroUsize),
    /// A heartbeat datagram arrived on a path. Anything may arrive here; rubbish is counted.
    Datagram(PathId, &'a [u8]),
    /// The local guest emitted a frame. `epoch` is the number of the last capture it ran after,
    /// stamped by the device while it took the frame from its ring, so that a frame from before a
    /// stop can never be taken for one from after it, however late it is reported. What a guest said
    /// that a [`GuestOp::LoadState`] has replaced is not reported any more.
    FromGuest {
        /// [`Captured`](GuestDone::Captured) epoch the frame follows.
        epoch: Epoch,
        /// The frame, from the Ethernet header on.
        frame: Bytes,
    },
    /// A client's frame arrived from the outside.
    FromWorld(Bytes),
    /// Dirty bitmap words of a slot, in KVM's layout: answers to [`GuestOp::Harvest`] and
    /// [`GuestOp::Capture`], given before the matching [`GuestDone`].
    Dirty(Slot, &'a [u64]),
    /// A [`GuestOp`] ended.
    Guest(GuestDone),
    /// The arbiter answered, or could not be reached.
    Arbiter(RequestId, Verdict),
    /// The record with this id is on stable storage.
    Persisted(PersistId),
    /// The peer was powered off, or could not be.
    Fenced(bool),
    /// The local host's health changed.
    Health(Health),
    /// The guest side's progress counter; hang detection starts with the first one (spec ownership
    /// F4).
    Progress(u32),
    /// An operator wants something. Answered by [`Output::Answer`], always.
    Command(CommandId, Command),
}

/// Something to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Output {
    /// For the guest; answered by [`Input::Guest`].
    Guest(GuestOp),
    /// Deliver a client frame to the local guest.
    ToGuest {
        /// Its index in the input log, counted from 1.
        index: u64,
        /// The frame.
        frame: Bytes,
    },
    /// Let a frame out, if the permit is still good at the moment of writing; else drop it.
    ToWorld {
        /// The frame.
        frame: Bytes,
        /// Until when it may leave.
        permit: Permit,
    },
    /// Comparers and filters are told (spec checkpoint 6); nothing to answer.
    Notify(Notify),
    /// Connect the channel; answered by [`Input::Up`] or [`Input::Down`].
    Dial(Channel),
    /// Close the channel after what was handed out for it is sent (or cannot be). Bytes of it
    /// that still arrive are dropped; no [`Input::Down`] is owed.
    HangUp(Channel),
    /// Send a heartbeat datagram; losing it is fine.
    Datagram(PathId, [u8; DATAGRAM_SIZE]),
    /// Put a ballot to the arbiter; answered by [`Input::Arbiter`]. May be repeated: the arbiter
    /// knows it by its request id.
    AskArbiter(Ballot),
    /// Read the arbiter's register; answered by [`Input::Arbiter`].
    ReadArbiter(RequestId),
    /// Power the peer off after the delay; answered by [`Input::Fenced`].
    Fence(Duration),
    /// Write the record to stable storage; answered by [`Input::Persisted`]. Writes take effect in
    /// the order in which they are asked for: an older record never replaces a newer one.
    Persist(PersistId, Record),
    /// Tell switches and clients where the VM lives now (gratuitous ARP and the like), if the permit
    /// is still good at the moment of writing. Comes several times after a takeover, since nobody
    /// acknowledges it.
    Announce(Permit),
    /// Answers one [`Input::Command`].
    Answer(CommandId, Answer),
    /// For logs, operators and tests.
    Event(Event),
}

/// What comparers and filters are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Notify {
    /// Primary: the checkpoint is safe on the secondary; the comparer starts anew.
    CompareCheckpoint(Epoch),
    /// Secondary: the checkpoint is being loaded; offsets are zero again.
    FilterCheckpoint(Epoch),
    /// Secondary: it takes over; translations live on until their connections end.
    FilterFailover,
    /// The guest here is the VM from now on: it was taken over, or boots. What it says besides frames,
    /// such as on a console, is said once.
    Serves,
    /// It is not any more: the other host has the VM, and what a guest here says it says too.
    Shadows,
}

/// A message to send: one `writev` of head and body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// Heads and small bodies.
    pub head: Bytes,
    /// What follows it.
    pub body: Body,
}

/// The body of a [`Transmit`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Body {
    /// Nothing.
    Empty,
    /// A frame.
    Bytes(Bytes),
    /// These pages, from guest RAM as it is now.
    Live(PageRuns),
    /// These pages, from the staging area of the last capture.
    Staged(PageRuns),
    /// This range of the last captured device state.
    State(Range<u64>),
}

impl Transmit {
    /// Bytes on the wire.
    #[must_use]
    pub fn len(&self) -> u64 {
        let body = match &self.body {
            Body::Empty => 0,
            Body::Bytes(b) => b.len() as u64,
            Body::Live(runs) | Body::Staged(runs) => runs.bytes(),
            Body::State(range) => range.end.saturating_sub(range.start),
        };
        self.head.len() as u64 + body
    }

    /// Whether there is nothing to send; never true of what a machine hands out.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What the next bytes of a channel are for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Demand {
    /// Nothing may be read now: the machine has no room, or the channel is closed. Bytes stay in
    /// the socket.
    Pause,
    /// A whole frame of this many bytes, as [`Input::Frame`].
    Frame(NonZeroUsize),
    /// One `readv`: first `place` (reported by [`Input::Placed`] when all of it is there), then
    /// `then` small bytes (reported by [`Input::Bytes`], all at once). At most
    /// [`wire::BODY_MOST`](crate::wire::BODY_MOST) small bytes are ever asked for.
    Read {
        /// Where the first bytes go.
        place: Option<Sink>,
        /// How many small bytes follow.
        then: usize,
    },
}

/// Where received contents go, without passing through the machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Sink {
    /// Straight into guest RAM: first synchronisation, the guest has never run.
    Guest(PageRuns),
    /// Into the cache: the full one or the staging area of the coming epoch.
    Cache(PageRuns),
    /// Into the buffer of the coming device state.
    State(Range<u64>),
}

impl Sink {
    /// How many bytes it takes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Guest(runs) | Self::Cache(runs) => runs.bytes(),
            Self::State(range) => range.end.saturating_sub(range.start),
        }
    }
}

/// When to wake the machine, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Deadline {
    /// When.
    pub at: Instant,
    /// For what.
    pub why: TimerKind,
}

/// What a timer is for. Loops count wake-ups by it: a spinning timer is found in minutes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum TimerKind {
    /// The peer must say hello, or be dialled again.
    Handshake,
    /// Heartbeats, leases, arbitration (spec ownership 8).
    Member,
    /// The longest interval between checkpoints is over, or the shortest has passed.
    Epoch,
    /// A held frame has waited too long for its match.
    Compare,
    /// A step of a checkpoint or synchronisation takes too long.
    Stall,
    /// The guest could not be stopped, which is tried again.
    Guest,
    /// Switches and clients are told once more where the VM lives.
    Announce,
}
