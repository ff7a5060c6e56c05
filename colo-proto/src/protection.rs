//! What stands between a primary's guest and a failure of its host.

use core::time::Duration;

use crate::{
    event::PeerLost,
    machine::{Deadline, TimerKind},
    member::Local,
    time::Instant,
};

/// What stands between this host's guest and a failure of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Protection {
    /// Nothing.
    None,
    /// A secondary is being synchronised.
    Syncing,
    /// It holds a whole state; since then ownership is being arranged. Output is held meanwhile.
    Arming(Instant),
    /// It would take over.
    Armed,
    /// It is gone, and until ownership is settled it might take over: output stays held.
    Severed,
}

impl Protection {
    /// Whether ownership could not be arranged in time. An arbiter that never answers must not hold
    /// output for ever, however much the peer has to say meanwhile.
    pub(crate) fn late(self, now: Instant, patience: Duration) -> Option<PeerLost> {
        match self {
            Self::Arming(since) if now.since(since) >= patience => {
                Some(PeerLost::TooSlow(patience))
            }
            _ => None,
        }
    }

    pub(crate) fn deadline(self, patience: Duration) -> Option<Deadline> {
        let Self::Arming(since) = self else {
            return None;
        };
        Some(Deadline {
            at: since + patience,
            why: TimerKind::Stall,
        })
    }

    /// The peer is lost: until it is settled that nobody else owns the VM, output stays held. Gives
    /// what the member is told.
    pub(crate) fn sever(&mut self) -> Option<Local> {
        let told = match self {
            Self::None | Self::Severed => return None,
            Self::Syncing | Self::Arming(_) => Local::ReplicaLost,
            Self::Armed => Local::ReplicationDead,
        };
        *self = Self::Severed;
        Some(told)
    }

    /// Nothing is shared any more. Gives what there was.
    pub(crate) const fn end(&mut self) -> Self {
        core::mem::replace(self, Self::None)
    }

    /// The phase in words, while it is this and not a checkpoint that matters.
    pub(crate) const fn name(self) -> Option<&'static str> {
        match self {
            Self::Arming(_) => Some("arranging ownership"),
            Self::Severed => Some("settling ownership"),
            _ => None,
        }
    }
}
