//! Whether a takeover would succeed: what a node needs for it beyond a whole replica.
//!
//! The survivor of a failure writes its record, then asks the arbiter. A host that could not do
//! either stays mute for good, so each of them is tried all the time, and each node tells the other
//! by the flags of its heartbeats what it found.

use core::time::Duration;

use super::{Flags, Health, Member, MemberState, phase::Phase};
use crate::time::Instant;

/// What a host lacks to go on by itself after a failure of the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, thiserror::Error)]
#[non_exhaustive]
pub enum Unready {
    /// Writes of its record do not end.
    #[error("its record cannot be written")]
    Record,
    /// The arbiter does not answer it.
    #[error("it does not reach the arbiter")]
    Arbiter,
    /// The register that it sees is not the one that the other host sees.
    #[error("its arbiter lost the register, or is not the one that the other host sees")]
    OtherArbiter,
    /// It could not run the VM: its guest's side failed or hangs.
    #[error("it is not fit to run the VM")]
    Unfit,
    /// It is not heard.
    #[error("it is silent")]
    Silent,
}

/// Why a failure of one host would not be survived.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, thiserror::Error)]
#[non_exhaustive]
pub enum Unprotected {
    /// There is no other host that could take over: this host's state of ownership.
    #[error("no other host is in step (this one is in the state {0:?})")]
    Unpaired(MemberState),
    /// Something of this host.
    #[error("this host: {0}")]
    Here(Unready),
    /// Something of the other host.
    #[error("the other host: {0}")]
    There(Unready),
}

impl Member {
    /// Why a failure of one host would not be survived at `now`, as far as ownership goes; `None`
    /// if it would. Both hosts say the same, each from its side.
    #[must_use]
    pub fn unprotected(&self, now: Instant) -> Option<Unprotected> {
        let paired = match &self.phase {
            Phase::Dual(pair) => pair.starting.is_none() && !pair.dropping,
            Phase::Secondary(watch) => self.is_durable(watch.after),
            _ => false,
        };
        if !paired {
            return Some(Unprotected::Unpaired(self.state()));
        }
        self.unready(now)
            .map(Unprotected::Here)
            .or_else(|| self.peer_unready(now).map(Unprotected::There))
    }

    /// What this host lacks.
    pub(super) fn unready(&self, now: Instant) -> Option<Unready> {
        // Only the partner looks whether the register is the owner's, which wrote it.
        let partner = matches!(self.phase, Phase::Secondary(_));
        if self.health == Health::Fatal || self.is_hanging() {
            Some(Unready::Unfit)
        } else if !self.writes_record(now) {
            Some(Unready::Record)
        } else if self.has_arbiter() && self.witness.foreign {
            Some(Unready::OtherArbiter)
        } else if self.has_arbiter() && !self.sees_arbiter(now) {
            Some(Unready::Arbiter)
        } else if self.has_arbiter() && partner && !self.shares_arbiter(now) {
            Some(Unready::OtherArbiter)
        } else {
            None
        }
    }

    /// What the peer says that it lacks.
    pub(super) fn peer_unready(&self, now: Instant) -> Option<Unready> {
        let owner = matches!(self.phase, Phase::Dual(_));
        let flags = self.peer.flags;
        if now.since(self.peer.heard) >= self.config.primary_silence {
            Some(Unready::Silent)
        } else if self.peer.health == Health::Fatal || (owner && !flags.has(Flags::CAPABLE)) {
            Some(Unready::Unfit)
        } else if !flags.has(Flags::RECORD) {
            Some(Unready::Record)
        } else if self.has_arbiter() && !flags.has(Flags::ARBITER) {
            Some(Unready::Arbiter)
        } else if self.has_arbiter() && owner && !flags.has(Flags::SHARED) {
            Some(Unready::OtherArbiter)
        } else {
            None
        }
    }

    /// The bits that tell the peer what [`unready`](Self::unready) looks at.
    pub(super) fn readiness(&self, now: Instant) -> u8 {
        let flag = |bit, set| if set { bit } else { 0 };
        flag(Flags::RECORD, self.writes_record(now))
            | flag(Flags::ARBITER, self.sees_arbiter(now))
            | flag(Flags::SHARED, self.shares_arbiter(now))
    }

    pub(super) fn writes_record(&self, now: Instant) -> bool {
        self.journal.is_well(now, self.probe_period())
    }

    /// Whether the arbiter answered one of the last two probes.
    pub(super) fn sees_arbiter(&self, now: Instant) -> bool {
        self.witness.is_well(now, self.probe_period() * 2)
    }

    fn shares_arbiter(&self, now: Instant) -> bool {
        self.witness.is_shared(now, self.probe_period() * 3)
    }

    /// How often record and arbiter are tried: often enough to tell of a loss within T_wit.
    pub(super) fn probe_period(&self) -> Duration {
        self.config.witness_silence / 4
    }
}
