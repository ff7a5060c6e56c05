//! Ctrl-C or TERM at any moment: a clean end, nothing left running, no stale socket.

use std::{
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use colod::demo::{Host, now};
use rustix::process::{Pid, Signal, kill_process};

use crate::common::*;

#[test]
fn of_a_daemon_ends_it_within_seconds_and_removes_its_socket() {
    let Some(_alone) = alone() else { return };
    for command in ["run", "primary", "secondary"] {
        for moment in [1, 15, 30, 45, 400] {
            let mut stage = stage();
            let mut daemon = stage.start(Host::A, command).unwrap();
            thread::sleep(Duration::from_millis(moment));
            // Not INT: what a shell starts in the background ignores that until the daemon's handlers
            // are in place.
            daemon.signal(Signal::TERM).unwrap();
            let status = daemon.wait_end(PATIENCE).unwrap();
            // Before its handlers are in place the signal itself ends it.
            let early = status.code().is_none();
            assert!(
                early || status.code() == Some(130),
                "{command}: {status}: {}",
                daemon.log()
            );
            assert!(!daemon.control().exists(), "{command} after {moment} ms");
        }
    }
}

#[test]
fn of_a_protected_primary_hands_the_vm_over() {
    let Some(_alone) = alone() else { return };
    // Ctrl-C, and what systemd sends.
    for signal in [Signal::INT, Signal::TERM] {
        let mut stage = stage();
        let (mut primary, secondary) = pair(&mut stage);
        let client = client(&mut stage);
        answered(&client, 0, &primary);
        let seen = secondary.events().len();
        primary.signal(signal).unwrap();
        expect(&secondary, "PROMOTED", seen);
        assert_eq!(primary.wait_end(PATIENCE).unwrap().code(), Some(130));
        answered(&client, now(), &secondary);
        served(client);
        one_voice_at_a_time(&mut stage);
    }
}

#[test]
fn of_the_demo_leaves_nothing_behind() {
    let Some(_alone) = alone() else { return };
    let dir = tempfile::tempdir().unwrap();
    for moment in [50, 600, 2_000] {
        let mut demo = Command::new(colod())
            .args(["demo", "--json", "--seconds", "1"])
            .env("TMPDIR", dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_millis(moment));
        let pid = Pid::from_raw(demo.id() as i32).unwrap();
        // It may be done already.
        let _done = kill_process(pid, Signal::INT);
        demo.wait().unwrap();
        let left: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert!(left.is_empty(), "after {moment} ms: {left:?}");
    }
}
