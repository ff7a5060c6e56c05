//! The systems that are explored, and how far.

use stateright::{Checker as _, HasDiscoveries};

use super::*;

/// Any order of delivery within a tick, the operator wrong once. Explored to the end.
fn operator() -> Claim {
    Claim {
        mutation: None,
        ticks: 4,
        age: 0,
        crashes: 0,
        failovers: 1,
        cuts: 0,
    }
}

/// A crash at any moment, and silence long enough to act on it. Explored as far as told.
fn crash() -> Claim {
    Claim {
        ticks: 10,
        crashes: 1,
        failovers: 0,
        ..operator()
    }
}

/// The network is cut and healed once, and messages overtake each other across ticks.
fn cut() -> Claim {
    Claim {
        ticks: 8,
        age: 1,
        cuts: 1,
        ..operator()
    }
}

/// How many states of the open-ended systems to visit.
fn bound() -> usize {
    std::env::var("COLO_MODEL_STATES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(60_000)
}

/// Nothing that must always hold fails within the bound.
fn explore(name: &str, claim: Claim) {
    let checker = claim
        .checker()
        .threads(2)
        .target_state_count(bound())
        .spawn_bfs()
        .join();
    println!(
        "{name}: {} states, {} unique, depth {}",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth()
    );
    checker.assert_no_discovery(ONE_GATE);
    checker.assert_no_discovery(NOTHING_FORGOTTEN);
}

#[test]
fn ownership_holds_in_every_interleaving_around_an_operator_error() {
    let checker = operator().checker().threads(2).spawn_bfs().join();
    checker.assert_properties();
    assert_eq!(checker.unique_state_count(), 1_104_777);
}

#[test]
fn ownership_holds_around_a_crash() {
    explore("crash", crash());
}

#[test]
fn ownership_holds_around_a_cut() {
    explore("cut", cut());
}

#[test]
fn time_starts_where_the_bound_says() {
    assert_eq!(operator().start().tick, START);
}

/// The checker is not vacuous: with a rule broken it finds two gates, or output forgotten.
#[test]
fn broken_rules_are_found() {
    for (mutation, property) in [
        (Mutation::AckAfterBallot, ONE_GATE),
        (Mutation::NoWait, ONE_GATE),
        (Mutation::OpenUnasked, ONE_GATE),
        (Mutation::UnlimitedWhileDual, ONE_GATE),
        (Mutation::PermitUnchecked, ONE_GATE),
    ] {
        let claim = Claim {
            mutation: Some(mutation),
            ..operator()
        };
        let checker = claim
            .checker()
            .threads(2)
            .finish_when(HasDiscoveries::AnyFailures)
            .spawn_bfs()
            .join();
        let path = checker.discovery(property);
        println!(
            "{mutation:?}: {} states: {:?}",
            checker.state_count(),
            path.as_ref().map(|p| p.clone().into_actions().len())
        );
        assert!(path.is_some(), "{mutation:?} was not found");
    }
}
