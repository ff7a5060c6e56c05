//! What an operator can ask, and how it is answered: done at the next safe point, or refused with
//! the reason. Never a broken pair.

use core::time::Duration;

use crate::{
    id::Role,
    member::{MemberState, Unprotected},
    status::Mode,
};

/// The driver's number for one command; the answer carries it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CommandId(pub u64);

/// What an operator wants. QEMU's names where QEMU has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Command {
    /// Take a checkpoint as soon as one is possible; answered when it is safe on the secondary.
    CheckpointNow,
    /// `x-colo-lost-heartbeat`: the peer is to be treated as lost. On the primary, end protection
    /// and go on alone; on the secondary, take over. Asks for ownership first: given on both
    /// hosts at once, one of them wins.
    LostHeartbeat,
    /// Planned switch: the primary hands the VM to its secondary.
    FailOver,
    /// End protection; the primary goes on alone and takes no new secondary, or the secondary seeks
    /// no primary, until [`Attach`](Self::Attach).
    Detach,
    /// Take a secondary, or seek a primary, again after [`Detach`](Self::Detach).
    Attach,
    /// Serve whatever the arbiter says, from what this host has: its memory, or else its disk. The
    /// operator vouches that the other host is off; **if it serves, both do**.
    Override,
    /// `migrate-set-parameters x-checkpoint-delay`: the longest interval between checkpoints.
    /// Unlike QEMU's it does not force a checkpoint (spec qemu D9).
    CheckpointDelay(Duration),
    /// Switch between lockstep and standby; takes effect at the next checkpoint.
    SetMode(Mode),
    /// `stop`: pause the guest until [`Continue`](Self::Continue); checkpoints do not undo it.
    /// Answered when it is paused. It is said of the guest on this host: after a takeover the VM
    /// runs.
    Stop,
    /// `cont`.
    Continue,
    /// `xen-set-replication`.
    XenSetReplication {
        /// Start or stop.
        enable: bool,
        /// In which role.
        role: Role,
        /// Stop for a failover. Only for stopping.
        failover: Option<bool>,
    },
    /// `xen-colo-do-checkpoint`.
    XenDoCheckpoint,
    /// The VM ends in good order: the peer is told, so that it does not take over.
    Shutdown,
}

/// The answer to a [`Command`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// It happened.
    Done,
    /// It will not, and why.
    Refused(Refusal),
}

/// Why a command was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// QEMU: "The feature 'colo' is not enabled".
    #[error("this VM is not protected: no secondary is in step")]
    NotProtected,
    /// QEMU: "COLO failover is already activated".
    #[error("a failover is already in progress")]
    FailoverInProgress,
    /// The same request is already being carried out.
    #[error("already in progress")]
    InProgress,
    /// The command makes sense on the other host.
    #[error("only the {0} can do this")]
    WrongRole(&'static str),
    /// The replica is not whole: nothing to take over with.
    #[error("the replica here is not whole; it can be offered again after a synchronisation")]
    NoReplica,
    /// What was asked for was under way when the peer was lost.
    #[error("the peer was lost before it was done")]
    PeerLost,
    /// The arbiter gave the VM to the other host.
    #[error("the VM belongs to the other host")]
    NotOwner,
    /// Ownership is in a state in which this host cannot do it.
    #[error("this host cannot do it in the state {0:?}")]
    Ownership(MemberState),
    /// A value outside its range.
    #[error("{key} is out of range, expected {expected}")]
    Range {
        /// The value's name.
        key: &'static str,
        /// What it may be.
        expected: &'static str,
    },
    /// QEMU: "Parameter 'failover' is only for stopping replication".
    #[error("parameter 'failover' is only for stopping replication")]
    FailoverOnlyForStop,
    /// The guest side could not do it, and has said why.
    #[error("the guest side failed; the event before this says why")]
    GuestFailed,
    /// An operator has stopped the guest.
    #[error("the guest is stopped here and would run there; continue it first")]
    Stopped,
    /// The other host could not take the VM now; it stays here.
    #[error("not handed over, {0}; the VM stays here")]
    AtRisk(Unprotected),
    /// It has not happened in time, and may happen yet.
    #[error("it has not happened in time and may happen yet; look at the status")]
    TookTooLong,
    /// A later command wants the opposite.
    #[error("a later command wants the opposite")]
    Countermanded,
}
