//! SIGKILL of either daemon at any moment: the client notices a silence and nothing else.

use std::{env, thread, time::Duration};

use colod::{
    config::{ModeName, Span},
    demo::{Client, Daemon, Host, Settings, Stage, now},
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use crate::common::*;

/// Kills of one test.
fn kills() -> usize {
    env::var("COLO_KILLS").map_or(4, |n| n.parse().unwrap())
}

/// A moment in a second of checkpoints every 20 ms: before, inside and after one.
fn random_moment(random: &mut StdRng) -> Duration {
    Duration::from_micros(random.random_range(0..300_000))
}

fn seed() -> StdRng {
    let seed = env::var("COLO_SEED").map_or_else(|_| now(), |n| n.parse().unwrap());
    println!("COLO_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// Kills the primary; gives back the survivor, alone.
fn lose_primary(mut primary: Daemon, secondary: Daemon, client: &Client) -> Daemon {
    let seen = secondary.events().len();
    let killed = now();
    primary.kill().unwrap();
    expect(&secondary, "PROMOTED", seen);
    answered(client, killed, &secondary);
    secondary
}

/// Starts the dead host again as secondary and waits for protection.
fn protect(stage: &mut Stage, primary: Daemon) -> (Daemon, Daemon) {
    let seen = primary.events().len();
    let secondary = stage.start(primary.host().other(), "secondary").unwrap();
    expect(&primary, "PROTECTED", seen);
    (primary, secondary)
}

#[test]
fn of_the_primary_at_any_moment_and_again_after_each_takeover() {
    let Some(_alone) = alone() else { return };
    kill_primaries(settings());
}

#[test]
fn of_the_primary_in_lockstep_where_the_secondary_goes_on_from_its_own_run() {
    let Some(_alone) = alone() else { return };
    let mut settings = settings();
    settings.protection.mode = ModeName::Lockstep;
    settings.protection.longest = Span::from_millis(500);
    kill_primaries(settings);
}

fn kill_primaries(settings: Settings) {
    let mut stage = Stage::new(colod(), settings).unwrap();
    let mut random = seed();
    let (mut primary, mut secondary) = pair(&mut stage);
    let client = client(&mut stage);
    answered(&client, 0, &primary);
    for kill in 0..kills() {
        let moment = random_moment(&mut random);
        println!("kill {kill}: after {moment:?}");
        thread::sleep(moment);
        let survivor = lose_primary(primary, secondary, &client);
        (primary, secondary) = protect(&mut stage, survivor);
    }
    drop((primary, secondary));
    one_voice_at_a_time(&mut stage);
    memory_held(&stage);
    let report = client.report();
    assert_eq!(report.fault, None);
}

#[test]
fn of_the_secondary_at_any_moment_also_while_it_synchronises() {
    let Some(_alone) = alone() else { return };
    let (mut stage, mut random) = (stage(), seed());
    let (primary, mut secondary) = pair(&mut stage);
    let client = client(&mut stage);
    answered(&client, 0, &primary);
    for kill in 0..kills() {
        let moment = random_moment(&mut random);
        println!("kill {kill}: after {moment:?}");
        thread::sleep(moment);
        let killed = now();
        secondary.kill().unwrap();
        answered(&client, killed, &primary);
        // Not waited for: this one dies while it synchronises, or just after.
        secondary = stage.start(Host::B, "secondary").unwrap();
        thread::sleep(random_moment(&mut random));
        let killed = now();
        secondary.kill().unwrap();
        answered(&client, killed, &primary);
        let seen = primary.events().len();
        secondary = stage.start(Host::B, "secondary").unwrap();
        expect(&primary, "PROTECTED", seen);
    }
    served(client);
    one_voice_at_a_time(&mut stage);
    memory_held(&stage);
}

#[test]
fn of_the_primary_before_anyone_is_in_step_leaves_the_secondary_mute() {
    let Some(_alone) = alone() else { return };
    let (mut stage, mut random) = (stage(), seed());
    let mut primary = stage.start(Host::A, "primary").unwrap();
    let client = client(&mut stage);
    answered(&client, 0, &primary);
    let secondary = stage.start(Host::B, "secondary").unwrap();
    thread::sleep(random_moment(&mut random) / 10);
    primary.kill().unwrap();
    let protected = primary
        .events()
        .iter()
        .any(|event| event["event"] == "PROTECTED");
    let promoted = secondary.wait_for("PROMOTED", 0, Duration::from_secs(2));
    if promoted.is_none() {
        let speakers = stage.switch().speakers(stage.settings_now().mac);
        assert!(!speakers.contains(&secondary.pid()), "{}", secondary.log());
    } else {
        // It was in step after all: then the VM lives on.
        assert!(
            protected || secondary.status().unwrap()["role"] == "primary",
            "{}",
            secondary.log()
        );
        assert!(client.answer_after(now(), PATIENCE).is_some());
    }
}
