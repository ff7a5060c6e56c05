//! Random schedules: every fault, at random steps, under every setup.
//!
//! `COLO_SCHEDULES=1000000 cargo test --release -p colo-tests --test pair schedules -- --nocapture`
//! runs many; `COLO_SEED=n` tells the story of one.

use std::{num::NonZeroUsize, ops::Range, sync::mpsc, thread};

use colo_proto::Bug;
use colo_tests::{Counts, Setup, World};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

pub(crate) fn play(seed: u64, bug: Option<Bug>, telling: bool) -> World {
    let setup = Setup {
        bug,
        ..Setup::numbered(seed)
    };
    let mut world = World::new(seed, setup);
    world.telling = telling;
    let settle = world.below(600);
    world.run(settle);
    for _ in 0..world.below(5) {
        world.misfortune();
        let pause = world.below(1_200);
        world.run(pause);
    }
    world.run(1_000);
    world.recovers(30_000);
    world
}

/// Plays the schedules on every processor, and tells what became of each as it ends.
fn played(seeds: Range<u64>) -> impl Iterator<Item = (u64, Counts, Option<String>)> {
    let workers = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let (tell, told) = mpsc::channel();
    for worker in 0..workers {
        let (tell, mine) = (tell.clone(), seeds.clone().skip(worker).step_by(workers));
        thread::spawn(move || {
            for seed in mine {
                let world = play(seed, None, false);
                tell.send((seed, world.counts, world.violation)).unwrap();
            }
        });
    }
    told.into_iter()
}

#[test]
fn random_schedules_break_no_promise() {
    if let Some(seed) = number("COLO_SEED") {
        let world = play(seed, None, true);
        println!("{}", world.story.join("\n"));
        assert_eq!(world.violation, None);
        return;
    }
    let first = number("COLO_FIRST").unwrap_or(0);
    let many = number("COLO_SCHEDULES").unwrap_or(60);
    let mut all = Counts::default();
    let mut violations = Vec::new();
    let mut played_out = 0;
    for (seed, counts, violation) in played(first..first + many) {
        played_out += 1;
        all.steps += counts.steps;
        all.epochs += counts.epochs;
        all.takeovers += counts.takeovers;
        all.cold_boots += counts.cold_boots;
        all.released += counts.released;
        all.protected += counts.protected;
        for (kind, n) in counts.faults {
            *all.faults.entry(kind).or_default() += n;
        }
        if let Some(what) = violation {
            println!("seed {seed}: {what}");
            violations.push(seed);
        }
    }
    violations.sort_unstable();
    assert_eq!(played_out, many, "a worker panicked");
    println!(
        "{many} schedules, {} violations: {all:#?}",
        violations.len()
    );
    assert!(
        violations.is_empty(),
        "COLO_SEED={} tells more",
        violations[0]
    );
    assert!(
        all.epochs > many && all.takeovers > 0 && all.released > many,
        "too little happened"
    );
}
