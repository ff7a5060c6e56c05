//! What the loop needs from whatever runs the guest.
//!
//! The loop never waits for the guest. [`Guest::start`] returns at once; an operation that takes
//! long (copying pages, loading state) runs on a thread of the guest's own, which keeps what came
//! of it and calls [`Wake::wake`]. The loop then takes it with [`Guest::poll`].
//!
//! # Memory
//!
//! Guest RAM is never a Rust slice: vCPUs write to it at any time. The guest hands the loop raw
//! [`Vectors`] for what is to be sent ([`Guest::source`]) and for where received bytes go
//! ([`Guest::sink`]), and the kernel does the copying.

pub mod fake;
mod vectors;

use std::io;

use bytes::Bytes;
use colo_proto::{
    id::{Epoch, Slot},
    machine::{Body, GuestDone, GuestOp, Input, Notify, Sink},
    member::{Health, Permit},
};
use mio::{Registry, Token};

pub use vectors::Vectors;

use crate::Wake;

/// One local guest: its memory, vCPUs, devices and network card.
pub trait Guest {
    /// Called once, before anything else: registers the guest's descriptors (tap, eventfds) with
    /// the loop's poll and keeps `wake` for its threads.
    ///
    /// # Errors
    /// When a descriptor cannot be registered.
    fn attach(&mut self, registry: &Registry, tokens: Tokens, wake: Wake) -> io::Result<()>;

    /// A descriptor that was registered with [`Tokens::get`]`(index)` is ready. Readiness is
    /// reported once until the descriptor has been used up to `WouldBlock`; the guest remembers
    /// it.
    fn ready(&mut self, index: usize, ready: Ready);

    /// Starts an operation; what comes of it is found by [`poll`](Self::poll). The machine starts
    /// one at a time.
    fn start(&mut self, op: GuestOp);

    /// The next thing that happened, without waiting. All [`Happened::Dirty`] of an operation come
    /// before its [`Happened::Done`]. A guest with more to give than one turn of the loop takes is
    /// asked again in the next one.
    fn poll(&mut self) -> Option<Happened>;

    /// Delivers a client's frame to the guest's network card. A card without room drops it, as a
    /// real one would, but counts `index` as consumed.
    fn to_guest(&mut self, index: u64, frame: Bytes);

    /// Lets a frame out. The permit is checked against [`clock::now`](crate::clock::now) right
    /// before the write, after whatever queueing there is; a frame whose permit has ended is
    /// dropped. This is the last gate: nothing else keeps a zombie mute.
    fn to_world(&mut self, frame: Bytes, permit: Permit);

    /// Tells switches and clients where the VM lives now. Asked for several times after a takeover,
    /// each time under a permit that is good now.
    fn announce(&mut self);

    /// Comparers and filters may want to know.
    fn notify(&mut self, notify: Notify) {
        let _ = notify;
    }

    /// Appends the memory of `body` to `into`: [`Body::Live`] is guest RAM, [`Body::Staged`] and
    /// [`Body::State`] are what the last capture kept. Other bodies never come.
    ///
    /// # Errors
    /// When it names memory that this guest does not have.
    fn source(&mut self, body: &Body, into: &mut Vectors) -> Result<(), MemoryError>;

    /// Appends the memory where received bytes go to `into`.
    ///
    /// # Errors
    /// When it names memory that this guest does not have, or cannot provide.
    fn sink(&mut self, sink: &Sink, into: &mut Vectors) -> Result<(), MemoryError>;
}

/// Something that happened on the guest's side.
#[derive(Debug)]
#[non_exhaustive]
pub enum Happened {
    /// Dirty bitmap words of a slot.
    Dirty(Slot, Vec<u64>),
    /// An operation ended.
    Done(GuestDone),
    /// The guest emitted a frame after the capture of `epoch`.
    FromGuest {
        /// Stamp of the device.
        epoch: Epoch,
        /// The frame.
        frame: Bytes,
    },
    /// A client's frame came from outside.
    FromWorld(Bytes),
    /// The health of the local host changed.
    Health(Health),
    /// The guest's side is alive: a number that changes while it makes progress. Hangs are looked
    /// for from the first one on.
    Progress(u32),
}

impl Happened {
    /// As the machine takes it.
    #[must_use]
    pub fn as_input(&self) -> Input<'_> {
        match self {
            Self::Dirty(slot, words) => Input::Dirty(*slot, words),
            Self::Done(done) => Input::Guest(done.clone()),
            Self::FromGuest { epoch, frame } => Input::FromGuest {
                epoch: *epoch,
                frame: frame.clone(),
            },
            Self::FromWorld(frame) => Input::FromWorld(frame.clone()),
            Self::Health(health) => Input::Health(*health),
            Self::Progress(count) => Input::Progress(*count),
        }
    }
}

/// What a descriptor is ready for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    /// It can be read, or has ended.
    pub readable: bool,
    /// It can be written.
    pub writable: bool,
}

/// Tokens for the guest's own descriptors.
#[derive(Clone, Copy, Debug)]
pub struct Tokens {
    base: usize,
}

impl Tokens {
    /// Everything above the loop's own tokens.
    pub const GUEST: Self = Self { base: 1 << 32 };

    /// The token of descriptor number `index`, any number below 2³².
    #[must_use]
    pub const fn get(self, index: usize) -> Token {
        Token(self.base + index)
    }

    /// The number that [`get`](Self::get) was given.
    #[must_use]
    pub const fn index(self, token: Token) -> Option<usize> {
        token.0.checked_sub(self.base)
    }
}

/// Memory that the guest does not have. Either end's configuration or the machine is wrong; the
/// channel is closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest has no memory for {what}: {why}")]
pub struct MemoryError {
    /// What was asked for.
    pub what: String,
    /// What is wrong with it.
    pub why: &'static str,
}
