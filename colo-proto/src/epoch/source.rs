//! The primary's phases.

use core::time::Duration;

use super::lanes::LaneEnds;
use crate::{
    event::{Cause, Event},
    id::Epoch,
    stats::{CheckpointTimes, Stats},
    status::Mode,
    time::Instant,
    wire::{Head, VmstateSend},
};

/// What the primary is doing about its secondary. Each phase holds only what it knows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    /// No secondary, or one that is not connected yet.
    Alone,
    /// A live round begins: the guest side is asked what changed.
    SyncHarvesting { round: u32 },
    /// Pages of the round are being sent from guest RAM.
    SyncSending {
        round: u32,
        pages: u64,
        lanes: LaneEnds,
    },
    /// The secondary has not yet got all of the round.
    SyncAwaitingDone { round: u32, pages: u64 },
    /// Between checkpoints.
    Running,
    /// CHECKPOINT_REQUEST is sent; the guest runs.
    Requesting(Transaction),
    /// The guest side copies and stops for a moment.
    Capturing(Transaction),
    /// Pages and state are being sent from the staging area.
    Sending {
        tx: Transaction,
        lanes: LaneEnds,
        state_sent: bool,
    },
    /// Everything is sent.
    AwaitingReceived(Transaction),
    /// The secondary holds the epoch and is loading it.
    AwaitingLoaded(Transaction),
}

/// One checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Transaction {
    pub(crate) epoch: Epoch,
    pub(crate) cause: Cause,
    /// It ends the first synchronisation.
    pub(crate) first: bool,
    /// Mode of the interval that it begins.
    pub(crate) mode: Mode,
    pub(crate) pages: u64,
    pub(crate) inputs: u64,
    pub(crate) state_len: u64,
    /// When the current phase began.
    pub(crate) since: Instant,
    pub(crate) times: CheckpointTimes,
}

impl Transaction {
    pub(crate) fn new(epoch: Epoch, cause: Cause, first: bool, mode: Mode, now: Instant) -> Self {
        Self {
            epoch,
            cause,
            first,
            mode,
            pages: 0,
            inputs: 0,
            state_len: 0,
            since: now,
            times: CheckpointTimes::default(),
        }
    }

    /// Counts a checkpoint that is complete, and says so.
    pub(crate) fn completed(&self, stats: &mut Stats) -> Event {
        stats.checkpoints += 1;
        stats.pages += self.pages;
        stats.state_bytes += self.state_len;
        stats.last = self.times;
        Event::Checkpointed {
            epoch: self.epoch,
            why: self.cause,
            pages: self.pages,
            times: self.times,
        }
    }

    /// VMSTATE_SEND.
    pub(crate) fn announcement(&self, mut head: Head) -> (Head, [u8; 16]) {
        head.arg = u32::from(self.mode == Mode::Lockstep);
        let (inputs, pages) = (self.inputs, self.pages);
        (head, VmstateSend { inputs, pages }.encode())
    }

    /// Time in the phase that ends now.
    pub(crate) fn lap(&mut self, now: Instant) -> Duration {
        let lap = now.since(self.since);
        self.since = now;
        lap
    }
}

impl Source {
    /// In a word, for status and faults.
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::SyncHarvesting { .. } => "synchronising (harvest)",
            Self::SyncSending { .. } => "synchronising (send)",
            Self::SyncAwaitingDone { .. } => "synchronising (await round)",
            Self::Running => "running",
            Self::Requesting(_) => "requesting a checkpoint",
            Self::Capturing(_) => "capturing",
            Self::Sending { .. } => "sending a checkpoint",
            Self::AwaitingReceived(_) => "awaiting VMSTATE_RECEIVED",
            Self::AwaitingLoaded(_) => "awaiting VMSTATE_LOADED",
        }
    }

    /// The transaction in progress.
    pub(crate) const fn transaction(&self) -> Option<&Transaction> {
        match self {
            Self::Requesting(tx)
            | Self::Capturing(tx)
            | Self::Sending { tx, .. }
            | Self::AwaitingReceived(tx)
            | Self::AwaitingLoaded(tx) => Some(tx),
            _ => None,
        }
    }

    /// Whether under QEMU's order the guest is stopped in this phase.
    pub(crate) const fn stopped_until_loaded(&self) -> bool {
        matches!(
            self,
            Self::Capturing(_)
                | Self::Sending { .. }
                | Self::AwaitingReceived(_)
                | Self::AwaitingLoaded(_)
        )
    }
}
