//! Seeded bugs: each rule broken on purpose, and the random schedules must notice. A check that
//! catches nothing here would prove nothing in `random`.

use colo_proto::member::Mutation;

use crate::random::schedule;

/// Schedules until a bug must have been found.
const MOST: u64 = 10_000;

/// The first violation, with the schedule that showed it.
fn caught(mutation: Mutation, from: u64) -> (u64, String) {
    (from..from + MOST)
        .find_map(|seed| {
            Some((
                seed,
                schedule(seed, |c| c, Some(mutation), false).violation?,
            ))
        })
        .unwrap_or_else(|| panic!("{mutation:?} was not caught in {MOST} schedules"))
}

/// Asserts that the bug is caught by the property that starts with `by`.
fn is_caught_by(mutation: Mutation, by: &[&str]) {
    // A state message that is overtaken, a dual-start, and a fault right then: one in 40,000.
    let from = if mutation == Mutation::AnyEpoch {
        38_900
    } else {
        0
    };
    let (seed, violation) = caught(mutation, from);
    println!("{mutation:?}: seed {seed}: {violation}");
    assert!(by.iter().any(|by| violation.starts_with(by)), "{violation}");
}

macro_rules! mutations {
    ($($name:ident: $bug:ident by $($by:literal)|+;)*) => {
        $(#[test] fn $name() { is_caught_by(Mutation::$bug, &[$($by),+]); })*
    };
}

mutations! {
    o1_acknowledging_after_the_ballot: AckAfterBallot by "S:" | "R:";
    o2_opening_without_the_wait: NoWait by "S:";
    o3_opening_without_a_grant: OpenUnasked by "S:" | "R:";
    o4_unlimited_gate_in_a_pair: UnlimitedWhileDual by "S:" | "R:";
    o5_abstaining_and_forgetting_it: AbstainForgotten by "O5:" | "S:" | "R:" | "critical";
    o5_promising_before_it_is_durable: SpeakBeforeDurable by "O5:";
    o5_yielding_with_an_open_gate: YieldKeepsGate by "S:" | "R:";
    o6_taking_silence_for_a_no: ForgetBallot by "S:" | "R:" | "O5:" | "critical";
    o7_asking_before_it_is_durable: BallotBeforeDurable by "O7:";
    dual_start_at_any_epoch: AnyEpoch by "R:";
    lease_counted_from_hearing: LeaseFromHearing by "S:" | "R:";
    permit_not_checked: PermitUnchecked by "S:" | "R:";
}
