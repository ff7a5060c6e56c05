//! Seeded bugs. Tests and models must find each of them; see docs/correctness.md.

/// A rule to break.
#[cfg(feature = "mutations")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mutation {
    /// O1: the secondary still acknowledges after it cast its ballot.
    AckAfterBallot,
    /// O2: the secondary opens as soon as it is granted.
    NoWait,
    /// O3: the primary opens for good on silence, without asking.
    OpenUnasked,
    /// O4: the gate stays unlimited in a dual generation.
    UnlimitedWhileDual,
    /// O5: the secondary abstains and forgets that it did.
    AbstainForgotten,
    /// O5: abstain and yield leave before they are durable.
    SpeakBeforeDurable,
    /// O5: the primary yields and keeps its gate as leased.
    YieldKeepsGate,
    /// O6: a ballot that timed out counts as failed.
    ForgetBallot,
    /// O7: the ballot leaves before the intention is durable.
    BallotBeforeDurable,
    /// The epoch of a dual-start is not compared.
    AnyEpoch,
    /// The boot ids of an acknowledgement are not compared.
    AnyBoot,
    /// The generation of an acknowledgement is not compared.
    AnyGeneration,
    /// The lease counts from hearing the acknowledgement instead of sending the heartbeat.
    LeaseFromHearing,
    /// The deadline of the permit is not checked.
    PermitUnchecked,
}

/// Whether the seeded bug is in this machine.
macro_rules! broken {
    ($member:expr, $bug:ident) => {
        crate::mutation::seeded!($member.mutation == Some(super::Mutation::$bug))
    };
}
pub(super) use broken;
