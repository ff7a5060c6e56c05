//! The secondary's phases.

use super::lanes::LaneEnds;
use crate::{id::Epoch, status::Mode};

/// What the secondary holds and what it is doing about the next epoch.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Target {
    /// No replica: nothing here may be run.
    Empty,
    /// Live rounds are arriving. Guest RAM is a mixture.
    Synchronising { round: u32, lanes: LaneEnds },
    /// A whole replica, and nothing under way.
    Shadowing,
    /// The guest is being stopped for a checkpoint.
    Pausing(Coming),
    /// The guest side is asked what this side wrote itself.
    Harvesting(Coming),
    /// Own dirty pages are being reported, then the reply.
    Replying(Coming),
    /// Pages and state arrive in the cache.
    Receiving(Coming),
    /// Everything is here; the guest side verifies the state.
    Checking(Coming),
    /// Past the commit point: from here it finishes whatever happens to the peer.
    CommittingRam(Whole),
    /// Disks are told.
    Replicating(Whole),
    /// Devices take the new state.
    LoadingState(Whole),
}

/// A checkpoint that is not whole yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Coming {
    pub(crate) epoch: Epoch,
    /// It ends the first synchronisation: before it there is no replica to fall back to.
    pub(crate) first: bool,
    /// From VMSTATE_SEND.
    pub(crate) announced: Option<Announced>,
    pub(crate) pages: u64,
    pub(crate) lanes: LaneEnds,
    pub(crate) state: StateBytes,
}

/// What VMSTATE_SEND said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Announced {
    pub(crate) mode: Mode,
    pub(crate) inputs: u64,
    pub(crate) pages: u64,
}

/// How far the device state has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum StateBytes {
    None,
    Coming(u64),
    Here(u64),
}

/// A checkpoint that is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Whole {
    pub(crate) epoch: Epoch,
    pub(crate) first: bool,
    pub(crate) mode: Mode,
    pub(crate) inputs: u64,
    pub(crate) state_len: u64,
    pub(crate) pages: u64,
}

impl Coming {
    pub(crate) fn new(epoch: Epoch, first: bool) -> Self {
        Self {
            epoch,
            first,
            announced: None,
            pages: 0,
            lanes: LaneEnds::default(),
            state: StateBytes::None,
        }
    }

    /// Whether everything announced is here.
    pub(crate) fn whole(&self, lanes: u8) -> Option<Whole> {
        let announced = self.announced?;
        let StateBytes::Here(state_len) = self.state else {
            return None;
        };
        (self.lanes.all_ended(lanes) && self.pages == announced.pages).then_some(Whole {
            epoch: self.epoch,
            first: self.first,
            mode: announced.mode,
            inputs: announced.inputs,
            state_len,
            pages: self.pages,
        })
    }
}

impl Target {
    /// In a word, for status and faults.
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Synchronising { .. } => "synchronising",
            Self::Shadowing => "shadowing",
            Self::Pausing(_) => "pausing",
            Self::Harvesting(_) => "harvesting",
            Self::Replying(_) => "replying",
            Self::Receiving(_) => "receiving",
            Self::Checking(_) => "checking",
            Self::CommittingRam(_) => "committing ram",
            Self::Replicating(_) => "replicating",
            Self::LoadingState(_) => "loading state",
        }
    }

    /// A checkpoint before its commit point.
    pub(crate) const fn coming(&self) -> Option<&Coming> {
        match self {
            Self::Pausing(c)
            | Self::Harvesting(c)
            | Self::Replying(c)
            | Self::Receiving(c)
            | Self::Checking(c) => Some(c),
            _ => None,
        }
    }

    /// A checkpoint past its commit point and not yet loaded: QEMU's `loading`.
    pub(crate) const fn loading(&self) -> bool {
        matches!(
            self,
            Self::CommittingRam(_) | Self::Replicating(_) | Self::LoadingState(_)
        )
    }
}
