//! The systems that are explored, what each has to show, and how many states it has.

use stateright::{Checker as _, HasDiscoveries};

use super::*;

/// What may happen in the ordinary runs.
const BUDGET: Budget = Budget {
    inputs: 2,
    checkpoints: 2,
    whims: 0,
    cuts: 1,
    crashes: 1,
    waits: 0,
    stops: 0,
    switches: 0,
    orders: 0,
    failovers: 1,
};

/// The secondary waits.
const STANDBY: Epochs = Epochs {
    mode: Mode::Standby,
    resume: ResumePolicy::AfterCapture,
    cache: CacheMode::Union,
    fresh: false,
    bug: None,
    budget: BUDGET,
};

/// The secondary's guest runs along, and once goes another way.
const LOCKSTEP: Epochs = Epochs {
    mode: Mode::Lockstep,
    budget: Budget {
        inputs: 1,
        checkpoints: 1,
        whims: 1,
        cuts: 0,
        ..BUDGET
    },
    ..STANDBY
};

/// What every system with a checkpoint and a failover shows.
const USUAL: [&str; 5] = [ROLLED_BACK, WHILE_APPLIED, BEFORE_KNOWN, ALONE, PROTECTED];

/// Explores all of a system: no law is broken, and all of `sometimes` comes about. Answers how many
/// states it has.
fn explore(system: Epochs, sometimes: &[&'static str]) -> usize {
    let checker = system.checker().threads(2).spawn_dfs().join();
    for law in LAWS {
        checker.assert_no_discovery(law);
    }
    for name in sometimes {
        checker.assert_any_discovery(name);
    }
    checker.unique_state_count()
}

#[test]
fn a_standby_takes_epochs_whole_or_not_at_all() {
    assert_eq!(
        explore(STANDBY, &[USUAL.as_slice(), &[COVERED]].concat()),
        67_992
    );
}

/// Every order of resuming with every way of keeping an epoch.
fn variants(system: Epochs) -> [Epochs; 3] {
    use CacheMode::{Full, Union};
    use ResumePolicy::{AfterCapture, AfterLoad};
    [(AfterCapture, Full), (AfterLoad, Union), (AfterLoad, Full)].map(|(resume, cache)| Epochs {
        resume,
        cache,
        ..system
    })
}

#[test]
fn a_standby_in_the_order_of_qemu_and_with_a_full_cache() {
    let sometimes = [USUAL.as_slice(), &[COVERED]].concat();
    let states = variants(STANDBY).map(|system| explore(system, &sometimes));
    assert_eq!(states, [67_992, 84_252, 84_252]);
}

#[test]
fn guests_in_lockstep() {
    assert_eq!(
        explore(LOCKSTEP, &[USUAL.as_slice(), &[AGREED]].concat()),
        32_778
    );
}

#[test]
fn guests_in_lockstep_in_the_order_of_qemu_and_with_a_full_cache() {
    let sometimes = [USUAL.as_slice(), &[AGREED]].concat();
    let states = variants(LOCKSTEP).map(|system| explore(system, &sometimes));
    assert_eq!(states, [28_363, 33_571, 29_857]);
}

/// Time passes, the operator stops and continues the guest and changes the mode.
const OPERATED: Budget = Budget {
    inputs: 1,
    checkpoints: 1,
    waits: 1,
    stops: 1,
    switches: 1,
    ..BUDGET
};

#[test]
fn what_an_operator_and_a_slow_link_may_do() {
    let budget = Budget {
        cuts: 0,
        switches: 0,
        ..OPERATED
    };
    assert_eq!(explore(Epochs { budget, ..STANDBY }, &USUAL), 125_755);
}

/// `cargo test --release -p colo-tests --test model epoch -- --ignored`
#[test]
#[ignore = "a minute in a release build"]
fn nearly_a_million_states_of_what_an_operator_and_a_slow_link_may_do() {
    let system = Epochs {
        budget: OPERATED,
        ..STANDBY
    };
    assert_eq!(explore(system, &USUAL), 972_982);
}

/// Every command at every step, to either host, and a crash besides. No failover: some of these
/// orders tell the primary that it is alone, and only one host may be told.
#[test]
fn any_order_at_any_moment() {
    let budget = Budget {
        inputs: 1,
        checkpoints: 1,
        cuts: 0,
        orders: 1,
        failovers: 0,
        ..BUDGET
    };
    for (system, states) in [(STANDBY, 4_463), (LOCKSTEP, 51_900)] {
        let system = Epochs { budget, ..system };
        assert_eq!(explore(system, &[PROTECTED, ALONE]), states);
    }
}

/// From the first dial on: live rounds, and everything that can end them.
#[test]
fn a_synchronisation_from_its_beginning() {
    let budget = Budget {
        checkpoints: 0,
        ..BUDGET
    };
    let system = Epochs {
        fresh: true,
        budget,
        ..STANDBY
    };
    assert_eq!(explore(system, &[PROTECTED, ALONE]), 18_302);
}

/// Larger systems, as far as told.
#[test]
fn larger_systems() {
    let bound = std::env::var("COLO_MODEL_STATES").ok();
    let bound = bound.and_then(|n| n.parse().ok()).unwrap_or(60_000);
    let everything = Budget {
        inputs: 3,
        whims: 1,
        waits: 1,
        stops: 1,
        switches: 1,
        ..BUDGET
    };
    for (name, system) in [("standby", STANDBY), ("lockstep", LOCKSTEP)] {
        let system = Epochs {
            budget: everything,
            ..system
        };
        let checker = system.checker().threads(2);
        let checker = checker.target_state_count(bound).spawn_dfs().join();
        println!(
            "{name}: {} states, {} unique, depth {}",
            checker.state_count(),
            checker.unique_state_count(),
            checker.max_depth()
        );
        for law in LAWS {
            checker.assert_no_discovery(law);
        }
    }
}

/// The checker is not vacuous: with a bug seeded it finds a law broken.
#[test]
fn seeded_bugs_are_found() {
    let small = Budget {
        inputs: 1,
        checkpoints: 1,
        ..BUDGET
    };
    let standby = Epochs {
        budget: small,
        ..STANDBY
    };
    for (bug, system, law) in [
        (Bug::ReleaseBeforeReceived, standby, COMMIT),
        (Bug::CommitPartial, standby, HONEST),
        (Bug::SettledWhileLoading, standby, WHOLE),
        (Bug::OwnPagesForgotten, LOCKSTEP, WHOLE),
        (Bug::CaptureWithoutAlso, LOCKSTEP, WHOLE),
        (Bug::NewOutputWithOld, standby, COMMIT),
        (Bug::MismatchIgnored, LOCKSTEP, COMMIT),
        (Bug::StaleOutputCompared, LOCKSTEP, COMMIT),
        (Bug::HalfAppliedOnLoss, standby, WHOLE),
        (Bug::WholeDroppedOnLoss, standby, WHOLE),
        (Bug::AckBeforeLoaded, standby, LOADED),
    ] {
        let system = Epochs {
            bug: Some(bug),
            ..system
        };
        let checker = system.checker().threads(2);
        let finish = HasDiscoveries::AnyFailures;
        let checker = checker.finish_when(finish).spawn_bfs().join();
        let found = LAWS.map(|law| {
            checker
                .discovery(law)
                .map(|path| (law, path.into_actions()))
        });
        let found: Vec<_> = found.into_iter().flatten().collect();
        println!("{bug:?}: {} states: {found:?}", checker.state_count());
        assert!(found.iter().any(|(broken, _)| *broken == law), "{bug:?}");
    }
}

/// Found by the model: the stall watch of a secondary past its commit point never came to rest.
#[test]
fn a_commit_that_takes_for_ever_is_waited_for_without_haste() {
    let mut world = STANDBY.start();
    world.command(0, Command::CheckpointNow);
    let commits = |world: &World| {
        let mut asked = world.pair.host(1).unwrap().asked();
        asked.any(|asked| matches!(asked, Output::Guest(GuestOp::CommitRam { .. })))
    };
    while !commits(&world) {
        world.follow();
        for at in 0..2 {
            if at == 0 || !commits(&world) {
                world.pair.effect(at, Effect::Guest).unwrap();
            }
            for channel in CHANNELS {
                world.pair.receive(at, channel).unwrap();
            }
        }
    }
    let before = world.pair.now();
    for _ in 0..3 {
        world.wait();
        world.follow();
    }
    assert!(world.deadline(1).unwrap() > world.pair.now());
    assert!(world.pair.now() > before);
    while world.pair.effect(1, Effect::Guest).unwrap() {}
    assert_eq!(world.vm(1).unwrap().loaded, Epoch(2), "it was whole");
}
