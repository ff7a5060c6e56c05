//! Who owns the VM: agreed upon by the hosts' members, or told by an operator.
//!
//! QEMU's wire carries no heartbeat and no lease. There the link and the operator are the only
//! sources: a secondary is accepted as soon as it is whole, and takes over when it is told
//! `x-colo-lost-heartbeat`, whatever the primary may be doing (spec qemu 16).

use alloc::collections::VecDeque;

use crate::{
    id::Generation,
    member::{
        Command, Local, Member, MemberOutput, MemberState, PathId, Permit, PersistId, RequestId,
        Unprotected, Verdict,
    },
    time::Instant,
};

/// Where a role learns whether it may act as the owner.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[expect(
    clippy::large_enum_variant,
    reason = "one for a host, and `Negotiated` is the usual one"
)]
pub(crate) enum Ownership {
    /// From its member and the arbiter.
    Negotiated(Member),
    /// From the link and its operator.
    External(External),
}

/// Ownership on QEMU's wire.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct External {
    state: MemberState,
    generation: Generation,
    outputs: VecDeque<MemberOutput>,
}

impl External {
    /// A primary: it owns the VM alone.
    pub(crate) const fn owner() -> Self {
        Self::new(MemberState::PrimarySolo)
    }

    /// A secondary that has nothing yet.
    pub(crate) const fn partner() -> Self {
        Self::new(MemberState::Syncing)
    }

    const fn new(state: MemberState) -> Self {
        Self {
            state,
            generation: Generation(0),
            outputs: VecDeque::new(),
        }
    }

    fn handle_local(&mut self, local: Local) {
        use MemberState::{PrimaryDual, PrimarySolo, Secondary, Syncing, TakeoverWait};
        self.state = match (self.state, local) {
            // From the request on the secondary may become whole, and nobody here may ever know.
            (PrimarySolo, Local::CheckpointRunning(true)) => PrimaryDual,
            (Syncing, Local::Synced { .. }) => Secondary,
            // A takeover waits for the checkpoint in hand, and that may fail.
            (Secondary | TakeoverWait, Local::ReplicaLost) => Syncing,
            (PrimaryDual, Local::Operator(Command::FailOver | Command::Detach)) => {
                self.outputs.push_back(MemberOutput::DropReplication);
                PrimarySolo
            }
            (Secondary, Local::Operator(Command::FailOver)) => {
                self.outputs.push_back(MemberOutput::Settle);
                TakeoverWait
            }
            (TakeoverWait, Local::Settled) => {
                self.generation = self.generation.next();
                let generation = self.generation;
                self.outputs
                    .push_back(MemberOutput::StartTakeover { generation });
                PrimarySolo
            }
            (state, _) => state,
        };
    }

    fn permit(&self) -> Option<Permit> {
        let owns = matches!(
            self.state,
            MemberState::PrimarySolo | MemberState::PrimaryDual
        );
        owns.then_some(Permit {
            generation: self.generation,
            until: Instant::END,
        })
    }
}

impl Ownership {
    /// Whether nobody agrees on anything: whoever connects is the partner.
    pub(crate) const fn is_told(&self) -> bool {
        matches!(self, Self::External(_))
    }

    /// The member, where there is one.
    pub(crate) const fn member(&self) -> Option<&Member> {
        match self {
            Self::Negotiated(member) => Some(member),
            Self::External(_) => None,
        }
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        if let Self::Negotiated(member) = self {
            member.handle_timeout(now);
        }
    }

    pub(crate) fn handle_datagram(&mut self, now: Instant, path: PathId, bytes: &[u8]) {
        if let Self::Negotiated(member) = self {
            member.handle_datagram(now, path, bytes);
        }
    }

    pub(crate) fn handle_arbiter(&mut self, now: Instant, request: RequestId, verdict: Verdict) {
        if let Self::Negotiated(member) = self {
            member.handle_arbiter(now, request, verdict);
        }
    }

    pub(crate) fn handle_fence(&mut self, now: Instant, ok: bool) {
        if let Self::Negotiated(member) = self {
            member.handle_fence(now, ok);
        }
    }

    pub(crate) fn handle_persisted(&mut self, now: Instant, id: PersistId) {
        if let Self::Negotiated(member) = self {
            member.handle_persisted(now, id);
        }
    }

    pub(crate) fn handle_local(&mut self, now: Instant, local: Local) {
        match self {
            Self::Negotiated(member) => member.handle_local(now, local),
            Self::External(told) => told.handle_local(local),
        }
    }

    pub(crate) fn poll_output(&mut self) -> Option<MemberOutput> {
        match self {
            Self::Negotiated(member) => member.poll_output(),
            Self::External(told) => told.outputs.pop_front(),
        }
    }

    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.member().map(Member::poll_timeout)?
    }

    pub(crate) fn permit(&self, now: Instant) -> Option<Permit> {
        match self {
            Self::Negotiated(member) => member.permit(now),
            Self::External(told) => told.permit(),
        }
    }

    pub(crate) fn is_alone(&self) -> bool {
        match self {
            Self::Negotiated(member) => member.is_alone(),
            Self::External(told) => told.state == MemberState::PrimarySolo,
        }
    }

    pub(crate) fn is_paired(&self) -> bool {
        match self {
            Self::Negotiated(member) => member.is_paired(),
            Self::External(told) => told.state == MemberState::PrimaryDual,
        }
    }

    /// Why a failure of one host would not be survived, as far as ownership goes.
    pub(crate) fn unprotected(&self, now: Instant) -> Option<Unprotected> {
        match self {
            Self::Negotiated(member) => member.unprotected(now),
            Self::External(told) => {
                let paired = matches!(
                    told.state,
                    MemberState::PrimaryDual | MemberState::Secondary
                );
                (!paired).then_some(Unprotected::Unpaired(told.state))
            }
        }
    }

    pub(crate) const fn state(&self) -> MemberState {
        match self {
            Self::Negotiated(member) => member.state(),
            Self::External(told) => told.state,
        }
    }

    pub(crate) const fn generation(&self) -> Generation {
        match self {
            Self::Negotiated(member) => member.generation(),
            Self::External(told) => told.generation,
        }
    }
}

impl From<External> for Ownership {
    fn from(told: External) -> Self {
        Self::External(told)
    }
}

impl From<Member> for Ownership {
    fn from(member: Member) -> Self {
        Self::Negotiated(member)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{id::Epoch, member::BootId};

    #[test]
    fn a_whole_secondary_takes_over_when_told_and_not_before() {
        let mut told = External::partner();
        told.handle_local(Local::Operator(Command::FailOver));
        assert_eq!(told.state, MemberState::Syncing, "there is no replica");
        told.handle_local(Local::Synced {
            from: BootId(1),
            epoch: Epoch(0),
        });
        told.handle_local(Local::ReplicationDead);
        assert_eq!(told.permit(), None);
        told.handle_local(Local::Operator(Command::FailOver));
        assert_eq!(told.outputs.pop_front(), Some(MemberOutput::Settle));
        told.handle_local(Local::Settled);
        let generation = Generation(1);
        assert_eq!(
            told.outputs.pop_front(),
            Some(MemberOutput::StartTakeover { generation })
        );
        assert!(told.permit().is_some());
    }

    #[test]
    fn a_primary_whose_link_is_dead_waits_for_its_operator() {
        let mut told = External::owner();
        told.handle_local(Local::CheckpointRunning(true));
        told.handle_local(Local::CheckpointRunning(false));
        told.handle_local(Local::ReplicaLost);
        assert_eq!(told.state, MemberState::PrimaryDual);
        told.handle_local(Local::Operator(Command::FailOver));
        assert_eq!(
            told.outputs.pop_front(),
            Some(MemberOutput::DropReplication)
        );
        assert_eq!(told.state, MemberState::PrimarySolo);
    }
}
