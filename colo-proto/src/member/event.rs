//! What goes in and out of a [`Member`](super::Member), apart from datagrams and verdicts.

use core::time::Duration;

use super::{
    Ballot, BootId, Health, MemberState, NodeId, PathId, PersistId, Record, RequestId, Unprotected,
    datagram::DATAGRAM_SIZE,
};
use crate::{
    id::{Epoch, Generation},
    time::Instant,
};

/// The right to let frames out: valid while `now < until`, checked as close to the wire as
/// possible (spec ownership A3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Permit {
    /// The ownership it stands for.
    pub generation: Generation,
    /// End of the lease; [`Instant::END`] for a solo owner.
    pub until: Instant,
}

impl Permit {
    /// Whether this node owns the VM alone, so that output needs no evidence from a partner. Under
    /// a lease it does: what is let out must be known to the partner, who may be next. The state
    /// alone does not tell; a node in state 4 is under its old lease until its record is durable.
    #[must_use]
    pub fn is_sole(&self) -> bool {
        self.until == Instant::END
    }

    /// Whether a frame may leave at `now`.
    #[must_use]
    pub fn allows(&self, now: Instant) -> bool {
        now < self.until
    }
}

/// What the local machine or its operator reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Local {
    /// Owner: the instance `boot` of the peer holds checkpoint `epoch` applied, disks equal.
    /// `evidence_clean`: nothing was released since `epoch` that this replica does not know, and
    /// output stays held until the machine is dual or the replica is reported lost.
    ReplicaReady {
        /// The instance that [`MemberOutput::StartSync`] named.
        boot: BootId,
        /// The checkpoint it holds.
        epoch: Epoch,
        /// See above.
        evidence_clean: bool,
    },
    /// Partner: the state of `epoch` is whole here, received from the owner's instance `from`.
    Synced {
        /// The owner's process instance.
        from: BootId,
        /// The checkpoint applied.
        epoch: Epoch,
    },
    /// The replica is of no use any more: owner, output may go out without it; partner, block
    /// error, failed apply or a gap in the inputs.
    ReplicaLost,
    /// The replication channels are dead. Only the owner acts on it: for the partner a dead
    /// channel may be a dead owner, and it must stay able to take over.
    ReplicationDead,
    /// How well this node is.
    Health(Health),
    /// The main loop's progress counter. Hang detection starts with the first one.
    Progress(u32),
    /// Whether a checkpoint is running.
    CheckpointRunning(bool),
    /// Last epoch committed (owner) or applied (partner).
    Applied(Epoch),
    /// The checkpoint in hand is applied or dropped: answer to [`MemberOutput::Settle`].
    Settled,
    /// The operator wants something.
    Operator(Command),
}

/// Operator commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// First node ever: create the register and boot the VM. On a node that is loading, or has
    /// nothing: boot it if the register is empty or names this node as the last owner.
    Create,
    /// Be the partner of whoever owns the VM.
    Join,
    /// "The peer is lost": ask for sole ownership now.
    FailOver,
    /// Primary: give the VM to the partner.
    Yield,
    /// Split the pair; the primary goes on alone.
    Detach,
    /// Act as if granted, and boot from the disk where there is nothing else. The operator vouches
    /// that the peer is off and that this node's state is the one to go on with; nothing else does.
    Override,
}

/// What the driver must do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MemberOutput {
    /// Send a datagram. Loss is allowed.
    Send {
        /// On this path.
        path: PathId,
        /// These bytes.
        bytes: [u8; DATAGRAM_SIZE],
    },
    /// Put a ballot to the arbiter; answer with `handle_arbiter`. May be repeated; the arbiter
    /// knows it by its request id.
    Cas(Ballot),
    /// Read the arbiter's register; answer with [`Verdict::Read`](super::Verdict::Read).
    ReadRegister {
        /// Names the question.
        request: RequestId,
    },
    /// Power the peer off after `delay`; answer with `handle_fence`.
    Fence {
        /// So that two nodes do not shoot each other.
        delay: Duration,
    },
    /// Write the record durably; then call `handle_persisted`. Writes take effect in order.
    Persist {
        /// Names the write.
        id: PersistId,
        /// The record.
        record: Record,
    },
    /// The gate changed. A closed gate takes effect before any later output is acted on.
    Gate(Option<Permit>),
    /// Stop the vCPUs; no output.
    PauseVm,
    /// Let the vCPUs run.
    ResumeVm,
    /// Owner alone now: refuse the peer's old messages, abort a running checkpoint, and flush held
    /// output (spec ownership 10).
    DropReplication,
    /// Partner: finish the checkpoint in hand if it is whole, drop it otherwise, then report
    /// [`Local::Settled`].
    Settle,
    /// Partner, now owner: take over disks, proxy and inputs.
    StartTakeover {
        /// The ownership.
        generation: Generation,
    },
    /// Owner: an instance of the peer waits to be synchronised.
    StartSync {
        /// It.
        peer: BootId,
    },
    /// The state here is old: throw it away.
    DiscardVm,
    /// Boot the VM from this node's disk.
    ColdBoot {
        /// The ownership.
        generation: Generation,
    },
    /// Announce the VM's addresses to the network.
    Announce,
    /// For the log.
    Event(MemberEvent),
}

/// What happened, for logs and operators.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MemberEvent {
    /// Another state.
    State {
        /// Left.
        from: MemberState,
        /// Entered.
        to: MemberState,
        /// In this generation.
        generation: Generation,
    },
    /// We were not called for longer than T_stall.
    Stalled(Duration),
    /// Nothing came on a path for T_p.
    PathDown(PathId),
    /// A path works again.
    PathUp(PathId),
    /// The primary does not hear our acknowledgements.
    NotHeard,
    /// The arbiter does not answer; repeated every T_wit.
    ArbiterSilent,
    /// The arbiter showed an older register than it once did. Its answer was ignored; the operator
    /// must re-seed it.
    ArbiterWentBack {
        /// Generation shown.
        got: Generation,
        /// Generation known.
        known: Generation,
    },
    /// A dual-start was refused.
    DualStartRefused {
        /// Its generation.
        generation: Generation,
        /// Its epoch.
        epoch: Epoch,
    },
    /// The peer runs with other settings of liveness or arbitration; there will be no pair.
    SettingsDiffer,
    /// A replica was ready, but output had been released that it does not know.
    ReplicaNotClean(Epoch),
    /// The main loop made no progress for T_hang.
    Hang,
    /// Nobody serves, and this node may not boot the VM by itself: either its operator must say so,
    /// or another node served last.
    NobodyServes {
        /// The node that the register names as the last owner.
        last: NodeId,
        /// In this generation.
        generation: Generation,
    },
    /// There is no register yet; `Create` makes it.
    WaitingForOperator,
    /// The record is of another VM or node; it was not used.
    RecordForeign,
    /// An operator command does not fit the state.
    Refused {
        /// The command.
        command: Command,
        /// The state.
        state: MemberState,
    },
    /// The VM was not offered to the partner, as an operator wanted: it could not take it.
    NotHandedOver(Unprotected),
    /// This must never happen, or must be known by a human.
    Critical(Critical),
}

/// Events that need a human.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Critical {
    /// Took over on silence without any arbiter: the other node may be serving too.
    UnsafeTakeover,
    /// The operator's override was used.
    OverrideUsed,
    /// Another node owns a VM that we held solo. Our gate is closed.
    OwnershipLost {
        /// The generation of the other ownership.
        generation: Generation,
    },
    /// Both nodes say that they own the VM alone, and there is no arbiter to ask.
    SplitBrain {
        /// The peer's generation.
        generation: Generation,
    },
}
