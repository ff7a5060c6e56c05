//! What each state knows, and nothing more.

use super::{
    BootId, Flags, Health, MemberState, PersistId, PriorRole,
    datagram::Control,
    handover::{Fresh, Handover},
    lease::Lease,
};
use crate::{
    id::{Epoch, Generation},
    time::Instant,
};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Phase {
    Idle(Idle),
    Syncing(Syncing),
    Secondary(Watch),
    Dual(Pair),
    Solo(Solo),
    PrimaryArbitrating(Pair),
    SecondaryArbitrating(Candidate),
    TakeoverWait(Wait),
    Fenced(Fenced),
}

/// 0: the record is being resolved.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub(super) struct Idle {
    /// Granted and never used: until when to look for a peer that still has the VM.
    pub(super) hand_back_until: Option<Instant>,
}

/// 1: loading the owner's state.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub(super) struct Syncing {
    /// The owner's instance whose state is whole here.
    pub(super) synced: Option<BootId>,
    /// Abstained from the current generation; to be told once this write is durable.
    pub(super) abstaining: Option<PersistId>,
}

/// 2: partner of an owner.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Watch {
    pub(super) owner: BootId,
    pub(super) last_heartbeat: Instant,
    pub(super) last_ack: Instant,
    /// Highest heartbeat number seen.
    pub(super) seq: u64,
    /// Acknowledgements wait for this write.
    pub(super) after: PersistId,
    /// What the owner last said it heard of us, and since when it says so.
    pub(super) heard: (u64, Instant),
    /// That was too long ago.
    pub(super) unheard: bool,
    /// What was written afresh because the owner wants to yield.
    pub(super) fresh: Option<Fresh>,
}

/// 3 and 5: owner under leases.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Pair {
    pub(super) partner: BootId,
    pub(super) lease: Lease,
    pub(super) last_ack: Instant,
    pub(super) flags: Flags,
    pub(super) health: Health,
    /// The dual-start goes out once this write is durable, until it is acknowledged.
    pub(super) starting: Option<PersistId>,
    /// The partner is to abstain.
    pub(super) dropping: bool,
    /// An operator wants the partner to have the VM.
    pub(super) handover: Option<Handover>,
}

/// 4: owner alone.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub(super) struct Solo {
    /// The gate opens once the write is durable.
    pub(super) opening: Option<(PersistId, Opening)>,
    /// A replica that waits for a dual grant.
    pub(super) replica: Option<(BootId, Epoch)>,
    /// The instance of the peer that is being synchronised.
    pub(super) syncing: Option<BootId>,
}

/// How a solo owner starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Opening {
    /// The running primary goes on alone.
    GoOn,
    /// The secondary becomes the primary.
    TakeOver,
    /// A fenced VM runs again.
    Resume,
    /// From the disk.
    ColdBoot,
}

/// 6: asking to be owner.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Candidate {
    pub(super) watch: Watch,
    /// The primary gave up, or is known to be off: no lease to wait for.
    pub(super) waived: bool,
    pub(super) capable: bool,
}

/// 7: granted, not open yet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Wait {
    pub(super) ready_at: Instant,
    pub(super) settled: bool,
}

/// 8: not the owner, VM paused.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Fenced {
    /// The VM or replica is in memory as it was when it was fenced.
    pub(super) intact: bool,
    pub(super) was: PriorRole,
    /// The generation it was fenced in.
    pub(super) of: Generation,
    /// Since when the VM is offered to the partner, and the write that must be durable first.
    pub(super) yielding: Option<(Instant, PersistId)>,
}

impl Phase {
    pub(super) const fn state(&self) -> MemberState {
        match self {
            Self::Idle(_) => MemberState::Idle,
            Self::Syncing(_) => MemberState::Syncing,
            Self::Secondary(_) => MemberState::Secondary,
            Self::Dual(_) => MemberState::PrimaryDual,
            Self::Solo(_) => MemberState::PrimarySolo,
            Self::PrimaryArbitrating(_) => MemberState::PrimaryArbitrating,
            Self::SecondaryArbitrating(_) => MemberState::SecondaryArbitrating,
            Self::TakeoverWait(_) => MemberState::TakeoverWait,
            Self::Fenced(_) => MemberState::Fenced,
        }
    }

    /// The peer instance this node is paired with.
    pub(super) fn paired(&self) -> BootId {
        match self {
            Self::Syncing(s) => s.synced.unwrap_or_default(),
            Self::Secondary(w) => w.owner,
            Self::SecondaryArbitrating(b) => b.watch.owner,
            Self::Dual(p) | Self::PrimaryArbitrating(p) => p.partner,
            Self::Idle(_) | Self::Solo(_) | Self::TakeoverWait(_) | Self::Fenced(_) => {
                BootId::default()
            }
        }
    }

    /// The control that is repeated every interval, and the write it must wait for.
    pub(super) fn repeated(&self) -> Option<(Control, PersistId)> {
        let now = PersistId::default();
        match self {
            Self::Idle(_) => Some((Control::Hello, now)),
            Self::Syncing(s) => Some(
                s.abstaining
                    .map_or((Control::Hello, now), |after| (Control::Abstain, after)),
            ),
            Self::Secondary(_) => None,
            Self::Dual(p) | Self::PrimaryArbitrating(p) => match p.starting {
                Some(after) => Some((Control::DualStart, after)),
                None => p.dropping.then_some((Control::DropRequest, now)),
            },
            Self::Solo(s) => s.opening.is_none().then_some((Control::SoloNotice, now)),
            Self::SecondaryArbitrating(_) | Self::TakeoverWait(_) => {
                Some((Control::Arbitrating, now))
            }
            Self::Fenced(f) => Some(
                f.yielding
                    .map_or((Control::Hello, now), |(_, after)| (Control::Yield, after)),
            ),
        }
    }
}
