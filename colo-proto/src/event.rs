//! What a machine reports: for logs, operators and tests. Nothing has to be done about an event.

use alloc::{boxed::Box, string::String, vec::Vec};
use core::time::Duration;

use crate::{
    error::PeerFault,
    id::{Channel, Epoch, Generation},
    member::{MemberEvent, Unprotected},
    operation::GuestOpKind,
    output::flow::Divergence,
    stats::CheckpointTimes,
    status::{ColoExit, FailoverStatus, Mode},
};

/// Something worth knowing.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Event {
    /// A peer said hello and fits.
    PeerAccepted {
        /// Its process (spec ownership 6).
        boot: u64,
    },
    /// A peer was refused, here or there, with everything that does not fit.
    PeerRefused {
        /// Each difference, for a person.
        reasons: Vec<String>,
    },
    /// The first synchronisation goes on.
    Synchronising {
        /// Round, from 0.
        round: u32,
        /// Pages of this round.
        pages: u64,
        /// Pages of it that have been handed to the sockets.
        sent: u64,
    },
    /// The rounds do not get shorter: the guest writes faster than the link carries. Rounds go on
    /// until the rest fits the bound of the last one.
    NotConverging {
        /// Pages that are left.
        pages: u64,
        /// The bound.
        most: u64,
    },
    /// The secondary holds a whole state and ownership is arranged: from here on a failure of
    /// either host is survived.
    Protected {
        /// In which mode.
        mode: Mode,
        /// The epoch the secondary holds.
        epoch: Epoch,
    },
    /// Both hosts are in step, and yet a failure would not be survived; `None`: now it would.
    AtRisk(Option<Unprotected>),
    /// An operation of the guest's side does not end: this host cannot run the VM, and gives it to
    /// one that can.
    GuestHangs(GuestOpKind),
    /// A checkpoint is complete.
    Checkpointed {
        /// Its number.
        epoch: Epoch,
        /// Why it was taken.
        why: Cause,
        /// Pages in it.
        pages: u64,
        /// Where its time went.
        times: CheckpointTimes,
    },
    /// The mode changed at a checkpoint.
    ModeChanged(Mode),
    /// The peer is gone or was left.
    PeerLeft(PeerLost),
    /// This host goes on alone, unprotected.
    Unprotected(Generation),
    /// This host took over.
    Promoted {
        /// The new ownership.
        generation: Generation,
        /// The state it starts from: the last checkpoint, or its own run since.
        epoch: Epoch,
    },
    /// This host lost ownership; its guest is muted and paused, then discarded.
    Fenced(Generation),
    /// QEMU's `COLO_EXIT`, sent when the guest here is safe, not before (spec qemu D3).
    ColoExit(ColoExit),
    /// The failover status changed (spec qemu 16).
    Failover(FailoverStatus),
    /// The guest side could not do something.
    GuestFailed {
        /// What.
        op: GuestOpKind,
        /// Why.
        why: String,
    },
    /// The guests said different things in a conversation: a checkpoint makes them one again.
    Parted(Box<Divergence>),
    /// A queue reached its bound and something gave way.
    QueueFull(Queue),
    /// Liveness and ownership (spec ownership 13.3).
    Member(MemberEvent),
}

/// A bounded queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Queue {
    /// Output waiting for its release: a checkpoint is asked for, then new frames are dropped.
    Held,
    /// Client frames waiting for the secondary: new ones are dropped for both guests.
    Inputs,
    /// The secondary's own output since the last checkpoint: the oldest are dropped.
    Shadow,
    /// Output released while the gate is shut: new frames are dropped.
    Gate,
}

/// Why a checkpoint was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Cause {
    /// The last round of the first synchronisation.
    FirstSync,
    /// The longest interval passed (`x-checkpoint-delay`).
    Longest,
    /// The outputs differ.
    Diverged,
    /// An output waited too long for its match.
    Unanswered,
    /// A queue is filling up.
    Full,
    /// An operator asked, or a setting takes effect at a checkpoint.
    Asked,
}

/// Why the peer is no longer one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PeerLost {
    /// Silence.
    Silent,
    /// A connection ended.
    HungUp(Channel),
    /// It broke the protocol.
    Faulty(PeerFault),
    /// It did not fit (hello refused).
    Unfit,
    /// It said goodbye: the VM ended in good order.
    Goodbye,
    /// It gave up this pairing and said why.
    Told(String),
    /// An operator wanted so.
    Asked,
    /// The arbiter gave the VM away.
    NotOwner,
    /// Our own guest side failed.
    Local(GuestOpKind),
    /// Protection could not be completed in time.
    TooSlow(Duration),
}
