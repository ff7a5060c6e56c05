//! Operations on the guest, and how they end.

use alloc::string::String;
use core::time::Duration;

use crate::id::{Epoch, PageRuns, Role};

/// What the guest side finished.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GuestDone {
    /// vCPUs stopped, devices quiet, disks flushed.
    Paused,
    /// Running.
    Resumed,
    /// All [`Input::Dirty`](crate::machine::Input::Dirty) of a [`GuestOp::Harvest`] were given.
    Harvested,
    /// All [`Input::Dirty`](crate::machine::Input::Dirty) of a [`GuestOp::Capture`] were given and the state is kept.
    Captured(Captured),
    /// The received device state is whole, of known versions and can be loaded.
    StateChecked(Epoch),
    /// Pages of the epoch are in guest RAM.
    RamCommitted(Epoch),
    /// The replication hook ended (spec checkpoint 6).
    Replication(ReplicationOp),
    /// Devices hold the state of the epoch.
    StateLoaded(Epoch),
    /// The operation failed; the reason is for the operator. For [`GuestOpKind::CommitRam`] and
    /// later ones the guest is a mixture now and will not be offered as a replica again.
    Failed {
        /// Which.
        op: GuestOpKind,
        /// Why, for a person.
        why: String,
    },
}

/// What a capture yielded.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Captured {
    /// The epoch captured.
    pub epoch: Epoch,
    /// Bytes of device state kept for sending.
    pub state_len: u64,
    /// Index of the last client frame that the captured state has consumed (delivered or
    /// dropped); the *cut* of the input log.
    pub inputs: u64,
    /// How long the vCPUs were stopped so far (to the resume, where it already happened).
    pub pause: Duration,
    /// How long the copy took while the guest was running (first pass).
    pub live: Duration,
}

impl Captured {
    /// A capture with `state_len` bytes of device state that consumed no client frame and took no
    /// time.
    #[must_use]
    pub const fn new(epoch: Epoch, state_len: u64) -> Self {
        Self {
            epoch,
            state_len,
            inputs: 0,
            pause: Duration::ZERO,
            live: Duration::ZERO,
        }
    }
}

/// An operation on the local guest. One at a time: the next is handed out after its
/// [`GuestDone`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GuestOp {
    /// Stop vCPUs, quiesce devices, flush disks.
    Pause,
    /// Run.
    Resume,
    /// Report every page written since the last harvest, capture or commit, while running.
    Harvest,
    /// Copy everything dirty and `also` to the staging area, save device state, and run on at
    /// once if `resume` says so. Pages first copied while running must be copied again if they
    /// were written before the stop. From this stop on frames are stamped with `epoch`.
    Capture {
        /// Number of the checkpoint.
        epoch: Epoch,
        /// Pages that the peer needs besides the dirty ones.
        also: PageRuns,
        /// Whether to run again as soon as the state is kept.
        resume: bool,
    },
    /// Verify the received device state without touching anything.
    CheckState(Epoch),
    /// Copy these pages from the cache into guest RAM (and disks). The guest is paused.
    CommitRam {
        /// The epoch they belong to.
        epoch: Epoch,
        /// Which.
        runs: PageRuns,
    },
    /// A replication hook; disks without replication answer at once.
    Replication(ReplicationOp),
    /// Load the received device state. RAM is committed, the guest is paused. From here on
    /// frames are stamped with `epoch`, and client frames after `inputs` are delivered anew.
    LoadState {
        /// The epoch.
        epoch: Epoch,
        /// The cut: index of the last client frame the state has consumed.
        inputs: u64,
    },
}

impl GuestOp {
    /// Which operation, without its arguments.
    #[must_use]
    pub const fn kind(&self) -> GuestOpKind {
        match self {
            Self::Pause => GuestOpKind::Pause,
            Self::Resume => GuestOpKind::Resume,
            Self::Harvest => GuestOpKind::Harvest,
            Self::Capture { .. } => GuestOpKind::Capture,
            Self::CheckState(_) => GuestOpKind::CheckState,
            Self::CommitRam { .. } => GuestOpKind::CommitRam,
            Self::Replication(_) => GuestOpKind::Replication,
            Self::LoadState { .. } => GuestOpKind::LoadState,
        }
    }

    /// What is reported when the operation has been carried out; of a capture, for a guest without
    /// device state.
    #[must_use]
    pub const fn done(&self) -> GuestDone {
        match *self {
            Self::Pause => GuestDone::Paused,
            Self::Resume => GuestDone::Resumed,
            Self::Harvest => GuestDone::Harvested,
            Self::Capture { epoch, .. } => GuestDone::Captured(Captured::new(epoch, 0)),
            Self::CheckState(epoch) => GuestDone::StateChecked(epoch),
            Self::CommitRam { epoch, .. } => GuestDone::RamCommitted(epoch),
            Self::Replication(op) => GuestDone::Replication(op),
            Self::LoadState { epoch, .. } => GuestDone::StateLoaded(epoch),
        }
    }
}

/// A [`GuestOp`] without its arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "each is the operation of the same name")]
pub enum GuestOpKind {
    Pause,
    Resume,
    Harvest,
    Capture,
    CheckState,
    CommitRam,
    Replication,
    LoadState,
}

/// Block replication hooks (spec checkpoint 6, spec qemu 16).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ReplicationOp {
    /// Protection begins in this role.
    Start(Role),
    /// A checkpoint is being applied: report any earlier I/O error, start a new interval.
    Checkpoint,
    /// Protection ends; with `failover` this side goes on alone and errors are only reported.
    Stop {
        /// Whether this side takes over.
        failover: bool,
    },
}
