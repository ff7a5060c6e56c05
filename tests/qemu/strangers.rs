//! Who connects and says nothing costs a primary nothing; a fence that fails resumes nothing; the
//! status file says whether COLO has begun. No QEMU needed.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
};

use colod::qemu::standby::{Event, Outcome};

use crate::{
    damage::{connect, migration, send},
    inspect::recording,
    side::Side,
    vm::arguments,
};

/// No timed assertion: the strangers' patience is an hour, and the primary is served meanwhile.
#[test]
fn a_silent_stranger_does_not_hold_up_a_primary() {
    let line = ["--listen", "127.0.0.1:0", "--silence", "3600000"];
    let command = ["--resume-with", "cat > /dev/null"];
    let side = Side::start(arguments(line.into_iter().chain(command)));
    let mut strangers: Vec<TcpStream> = (0..5).map(|_| connect(&side.uri)).collect();
    // One that is not quite silent.
    strangers[0].write_all(b"QEV").unwrap();
    let mut primary = connect(&side.uri);
    primary.write_all(&recording()[..migration()]).unwrap();
    let mut ready = [9; 4];
    primary.read_exact(&mut ready).unwrap();
    assert_eq!(ready, [0; 4]);
    assert_eq!(side.next(), Event::Connected);
    assert!(matches!(side.next(), Event::Whole { epoch: 0, .. }));
    drop(primary);
    let (lost, _) = side.after_checkpoints();
    assert!(
        matches!(lost, Event::Lost { resumes: true, .. }),
        "{lost:?}"
    );
    assert!(matches!(side.next(), Event::Piped { .. }));
    side.join();
    drop(strangers);
}

/// It is closed after `--silence`, so that descriptors do not run out.
#[test]
fn a_silent_stranger_is_shown_out() {
    let line = ["--listen", "127.0.0.1:0", "--silence", "100"];
    let command = ["--resume-with", "cat > /dev/null"];
    let side = Side::start(arguments(line.into_iter().chain(command)));
    let mut stranger = connect(&side.uri);
    assert_eq!(stranger.read(&mut [0; 4]).unwrap(), 0);
    side.stop();
    assert_eq!(side.join(), Outcome::Stopped);
}

#[test]
fn nothing_is_resumed_before_the_fence_succeeds() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (fenced, resumed) = (path("fenced"), path("resumed"));
    let fence = format!("test -e {fenced} && echo \"fenced $COLO_EPOCH\" >> {resumed}");
    let command = format!("cat > /dev/null; echo resumed >> {resumed}");
    let side = Side::start(arguments([
        "--listen",
        "127.0.0.1:0",
        "--fence",
        &fence,
        "--resume-with",
        &command,
    ]));
    send(&side.uri, &recording());
    let event = loop {
        match side.after_checkpoints().0 {
            Event::Connected | Event::Lost { resumes: true, .. } => {}
            other => break other,
        }
    };
    assert!(matches!(event, Event::NotFenced { .. }), "{event:?}");
    assert!(!std::path::Path::new(&resumed).exists());
    std::fs::write(&fenced, "").unwrap();
    assert!(matches!(side.join(), Outcome::Resumed(epoch, Some(_)) if epoch.0 == 11));
    let said = std::fs::read_to_string(&resumed).unwrap();
    assert_eq!(said, "fenced 11\nresumed\n");
}

/// Asked to stop while the fence fails, it has resumed nothing.
#[test]
fn a_fence_that_never_succeeds_can_be_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let resumed = dir.path().join("resumed");
    let command = format!("cat > {}", resumed.display());
    let line = ["--listen", "127.0.0.1:0", "--fence", "exit 3"];
    let side = Side::start(arguments(
        line.into_iter().chain(["--resume-with", &command]),
    ));
    send(&side.uri, &recording());
    while !matches!(side.next(), Event::NotFenced { .. }) {}
    side.stop();
    assert_eq!(side.join(), Outcome::Stopped);
    assert!(!resumed.exists());
}

#[test]
fn the_status_says_whether_colo_has_begun() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("status");
    let says = |wanted: &str, protected: bool| {
        let text = std::fs::read_to_string(&path).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert!(json["text"].as_str().unwrap().contains(wanted), "{text}");
        assert_eq!(json["protected"], protected);
    };
    let start = || {
        let line = [
            "--listen",
            "127.0.0.1:0",
            "--resume-with",
            "cat > /dev/null",
        ];
        Side::start(arguments(
            line.into_iter().chain(["--status", path.to_str().unwrap()]),
        ))
    };
    let side = start();
    says("no primary", false);
    // A plain migration, as QEMU 10.0.2 makes of COLO.
    send(&side.uri, &recording()[..migration()]);
    let (lost, _) = loop {
        match side.after_checkpoints() {
            (Event::Connected, _) => {}
            other => break other,
        }
    };
    let Event::Lost { reason, .. } = lost else {
        panic!("{lost:?}");
    };
    assert!(reason.contains("COLO never began"), "{reason}");
    side.join();
    says("COLO never began", false);

    let side = start();
    let mut primary = connect(&side.uri);
    primary.write_all(&recording()[..migration()]).unwrap();
    primary.read_exact(&mut [0; 4]).unwrap();
    while !matches!(side.next(), Event::Whole { epoch: 0, .. }) {}
    says("COLO has not begun", false);
    primary.write_all(&[0, 0, 0, 1]).unwrap();
    while !matches!(side.next(), Event::Protected { .. }) {}
    says("by the rules of QEMU 7.2", true);
}
