//! Random schedules: every fault, at random steps, under every setup.
//!
//! `COLO_SCHEDULES=1000000 cargo test --release -p colo-tests --test pair schedules -- --nocapture`
//! runs many; `COLO_SEED=n` tells the story of one.

use std::{ops::Range, sync::mpsc, thread};

use colo_proto::mutation::Bug;
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
    world
}

/// Plays the schedules on every processor; gives them back in order.
fn played(seeds: Range<u64>) -> impl Iterator<Item = (u64, World)> {
    let workers = thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let (many, first) = (seeds.end - seeds.start, seeds.start);
    let results: Vec<_> = (0..workers)
        .map(|worker| {
            // A worker that is far ahead waits: a world is large.
            let (give, take) = mpsc::sync_channel(16);
            thread::spawn(move || {
                for n in (worker..many).step_by(workers as usize) {
                    if give.send(play(first + n, None, false)).is_err() {
                        return;
                    }
                }
            });
            take
        })
        .collect();
    seeds.map(move |seed| {
        let worker = (seed - first) % workers;
        let world = results[worker as usize].recv().expect("a worker lives on");
        (seed, world)
    })
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
    for (seed, world) in played(first..first + many) {
        all.steps += world.counts.steps;
        all.epochs += world.counts.epochs;
        all.takeovers += world.counts.takeovers;
        all.cold_boots += world.counts.cold_boots;
        all.released += world.counts.released;
        all.protected += world.counts.protected;
        for (kind, n) in world.counts.faults {
            *all.faults.entry(kind).or_default() += n;
        }
        if let Some(what) = world.violation {
            println!("seed {seed}: {what}");
            violations.push(seed);
        }
    }
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
