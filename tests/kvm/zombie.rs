//! A primary that freezes until its peer has taken over, then thaws: it must stay mute.

use std::{thread, time::Duration};

use colod::demo::now;
use rustix::process::Signal;

use crate::common::*;

#[test]
fn a_thawed_primary_is_not_heard_and_becomes_useful_again() {
    let Some(_alone) = alone() else { return };
    let mut stage = stage();
    let (primary, secondary) = pair(&mut stage);
    let client = client(&mut stage);
    answered(&client, 0, &primary);
    let seen = secondary.events().len();
    let frozen = now();
    primary.signal(Signal::STOP).unwrap();
    expect(&secondary, "PROMOTED", seen);
    answered(&client, frozen, &secondary);
    let before = primary.events().len();
    primary.signal(Signal::CONT).unwrap();
    // It learns that it lost, and nothing of what it had queued comes out.
    expect(&primary, "FENCED", before);
    let answered = now();
    assert!(client.answer_after(answered, PATIENCE).is_some());
    thread::sleep(Duration::from_millis(300));
    one_voice_at_a_time(&mut stage);
    served(client);
}

#[test]
fn a_freeze_shorter_than_detection_is_only_a_pause() {
    let Some(_alone) = alone() else { return };
    let mut stage = stage();
    let (primary, secondary) = pair(&mut stage);
    let client = client(&mut stage);
    answered(&client, 0, &primary);
    let seen = secondary.events().len();
    primary.signal(Signal::STOP).unwrap();
    thread::sleep(Duration::from_millis(80));
    primary.signal(Signal::CONT).unwrap();
    answered(&client, now(), &primary);
    assert!(
        secondary
            .wait_for("PROMOTED", seen, Duration::from_millis(500))
            .is_none()
    );
    served(client);
    one_voice_at_a_time(&mut stage);
}
