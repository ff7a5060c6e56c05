//! Seeded bugs of the epoch and output side: the random schedules must notice each. A check that
//! catches nothing here would prove nothing in `schedules`.
//!
//! `HalfAppliedOnLoss` is left to the model (`tests/model/epoch.rs`): it takes a cut between the
//! state and the last page, which random schedules meet too rarely.

use colo_proto::Bug;

use crate::schedules::play;

/// Schedules until a bug must have been found.
const MOST: u64 = 8_000;

/// Asserts that a schedule shows the bug by a violation that contains one of these, and that the
/// same schedule without the bug is clean.
fn is_caught_by(bug: Bug, by: &[&str]) {
    let (seed, violation) = (0..MOST)
        .find_map(|seed| Some((seed, play(seed, Some(bug), false).violation?)))
        .unwrap_or_else(|| panic!("{bug:?} was not caught in {MOST} schedules"));
    println!("{bug:?}: seed {seed}: {violation}");
    assert!(by.iter().any(|by| violation.contains(by)), "{violation}");
    assert_eq!(play(seed, None, false).violation, None);
}

macro_rules! mutations {
    ($($(#[$how:meta])* $name:ident: $bug:ident by $($by:literal)|+;)*) => {
        $(#[test] $(#[$how])* fn $name() { is_caught_by(Bug::$bug, &[$($by),+]); })*
    };
}

mutations! {
    released_before_received: ReleaseBeforeReceived by "output commit";
    partial_epoch_committed: CommitPartial by "RAM after a commit" | "honest peer";
    settled_while_loading: SettledWhileLoading by "mixture" | "output commit" | "RAM is committed" | "frame stamped";
    own_pages_forgotten: OwnPagesForgotten by "RAM after a commit";
    capture_without_also: CaptureWithoutAlso by "RAM after a commit";
    new_output_with_the_old_epoch: NewOutputWithOld by "output commit";
    mismatch_ignored: MismatchIgnored by "output commit";
    whole_dropped_on_loss: WholeDroppedOnLoss by "mixture" | "output commit";
    acknowledged_before_loaded: AckBeforeLoaded by "too early";
}
