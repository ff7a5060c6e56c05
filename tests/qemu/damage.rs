//! A primary that sends rubbish loses its link and nothing else: the last good checkpoint is kept,
//! not resumed, and the standby takes the next primary. Nor does what fails on this side cost the
//! guest. No QEMU needed.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpStream},
    path::PathBuf,
    sync::{Arc, mpsc::channel},
    time::Duration,
};

use clap::Parser as _;
use colo_proto::id::Epoch;
use colod::qemu::{
    Stop,
    feed::{self, FeedArgs},
    inspect::{self, InspectArgs},
    standby::{self, Event, Outcome, StandbyArgs},
};
use tempfile::TempDir;

use crate::{
    inspect::{RECORDING, recording},
    side::Side,
    vm::arguments,
};

/// QEMU's messages, as they stand on the wire.
const READY: [u8; 4] = [0, 0, 0, 0];
const REQUEST: [u8; 4] = [0, 0, 0, 1];
const REPLY: [u8; 4] = [0, 0, 0, 2];

#[derive(clap::Parser)]
#[command(no_binary_name = true)]
struct Feed {
    #[command(flatten)]
    args: FeedArgs,
}

#[derive(clap::Parser)]
#[command(no_binary_name = true)]
struct StandbyLine {
    #[command(flatten)]
    args: StandbyArgs,
}

#[derive(clap::Parser)]
#[command(no_binary_name = true)]
struct Inspect {
    #[command(flatten)]
    args: InspectArgs,
}

pub(crate) fn connect(address: &str) -> TcpStream {
    TcpStream::connect(address.trim_start_matches("tcp:")).unwrap()
}

/// A primary that does not wait for replies, which is its own affair, and then dies.
pub(crate) fn send(address: &str, bytes: &[u8]) {
    let mut primary = connect(address);
    primary.write_all(bytes).unwrap();
    primary.shutdown(Shutdown::Write).unwrap();
    // The link may be reset: what was not read of it is lost.
    let _ = primary.read_to_end(&mut vec![]);
}

/// The third checkpoint's blob lacks its end mark: everything before that byte is good.
fn rubbish() -> Vec<u8> {
    let line = Inspect::try_parse_from([RECORDING]).unwrap();
    let report = inspect::inspect(&line.args).unwrap();
    let end = usize::try_from(report.checkpoints[2].end).unwrap();
    let mut damaged = recording();
    damaged.truncate(end);
    damaged[end - 1] = 0x7E;
    damaged
}

/// How many bytes of the recording are its migration.
pub(crate) fn migration() -> usize {
    let line = Inspect::try_parse_from([RECORDING]).unwrap();
    let report = inspect::inspect(&line.args).unwrap();
    usize::try_from(report.initial.end.unwrap()).unwrap()
}

#[test]
fn rubbish_costs_the_link_and_not_the_last_good_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("vm.stream");
    let state = dir.path().join("state");
    let side = Side::start(arguments([
        "--listen".as_ref(),
        "127.0.0.1:0".as_ref(),
        "--out".as_ref(),
        out.as_os_str(),
        "--state".as_ref(),
        state.as_os_str(),
    ]));

    send(&side.uri, &rubbish());
    assert_eq!(side.next(), Event::Connected);
    let (lost, newest) = side.after_checkpoints();
    let Event::Lost {
        reason,
        epoch: Some(2),
        resumes: false,
    } = lost
    else {
        panic!("{lost:?}");
    };
    assert_eq!(newest, Some(2));
    assert!(reason.contains("device blob"), "{reason}");
    assert!(matches!(side.next(), Event::Written { .. }));
    let kept = std::fs::read(&out).unwrap();

    // Whatever comes next, the good one stays until a better one is whole.
    let mut hostile = connect(&side.uri);
    hostile
        .write_all(b"QEVM\0\0\0\x03\x07\xff\xff\xff\xff")
        .unwrap();
    assert_eq!(side.next(), Event::Connected);
    let (lost, None) = side.after_checkpoints() else {
        panic!("nothing was whole");
    };
    assert!(matches!(&lost, Event::Lost { epoch: None, .. }), "{lost:?}");
    assert!(std::fs::read(&out).unwrap() == kept);
    let disk = Side::from_state(arguments([
        "--state".as_ref(),
        state.as_os_str(),
        "--from-state".as_ref(),
        "--out".as_ref(),
        dir.path().join("disk.stream").as_os_str(),
    ]));
    assert!(matches!(disk.join(), Outcome::Resumed(epoch, None) if epoch.0 == 2));

    // Our own primary role, into the same standby.
    let line = Feed::try_parse_from(["--connect", &side.uri, RECORDING]).unwrap();
    let fed = feed::run(&line.args, &Stop::new().unwrap(), &mut |_| {}).unwrap();
    assert_eq!(fed, 11);
    assert!(matches!(side.join(), Outcome::Resumed(epoch, None) if epoch.0 == 11));
}

/// Found out when the primary is gone it would cost the checkpoint.
#[test]
fn a_file_that_cannot_be_written_is_refused_before_a_primary_is_awaited() {
    let dir = tempfile::tempdir().unwrap();
    for (out, says) in [
        (dir.path().join("no/such/vm.stream"), "No such file"),
        (dir.path().to_owned(), "is a directory"),
    ] {
        let line = ["--listen", "127.0.0.1:0", "--out", out.to_str().unwrap()];
        let args = StandbyLine::try_parse_from(line).unwrap().args;
        let refused = standby::run(&args, &Stop::new().unwrap(), &mut |event| {
            panic!("it goes on: {event:?}");
        });
        let said = refused.unwrap_err().to_string();
        assert!(said.starts_with("cannot write the stream to"), "{said}");
        assert!(said.contains(says), "{said}");
    }
}

/// Whoever prints an event, or the disk below --state, takes longer than the idle silence. The next
/// checkpoint is asked for meanwhile, or at once afterwards: either way the primary has the VM.
#[test]
fn a_primary_is_not_silent_because_this_side_was_busy() {
    for meanwhile in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("vm.stream");
        let args = StandbyLine::try_parse_from([
            "--listen",
            "127.0.0.1:0",
            "--idle-silence",
            "500",
            "--out",
            out.to_str().unwrap(),
        ]);
        let args = args.unwrap().args;
        let (stop, (tell, events)) = (Arc::new(Stop::new().unwrap()), channel());
        let (asked, is_asked) = channel::<()>();
        let (rested, is_rested) = channel();
        let stopping = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            standby::run(&args, &stopping, &mut |event| {
                if let Event::Whole { epoch: 0, .. } = event {
                    if meanwhile {
                        is_asked.recv().unwrap();
                    }
                    std::thread::sleep(Duration::from_millis(600));
                    rested.send(()).unwrap();
                }
                let _ = tell.send(event);
            })
        });
        let Event::Listening { address } = events.recv().unwrap() else {
            panic!("expected to listen first");
        };
        let mut primary = connect(&address);
        primary.write_all(&recording()[..migration()]).unwrap();
        let mut reply = [9; 4];
        primary.read_exact(&mut reply).unwrap();
        assert_eq!(reply, READY);
        if !meanwhile {
            is_rested.recv().unwrap();
        }
        primary.write_all(&REQUEST).unwrap();
        let _ = asked.send(());
        let answered = primary.read_exact(&mut reply).map(|()| reply);
        stop.ask();
        let outcome = thread.join().unwrap();
        let said: Vec<Event> = events.try_iter().collect();
        assert_eq!(answered.ok(), Some(REPLY), "{meanwhile}: {said:?}");
        assert_eq!(outcome.unwrap(), Outcome::Stopped);
    }
}

/// The whole process group: a signal for the shell alone would leave QEMU behind.
#[test]
fn who_ends_the_standby_ends_the_command_that_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let ready = dir.path().join("ready");
    // QEMU's part is played by a child that the shell waits for.
    let command = format!(
        "trap 'exit 7' TERM; cat > /dev/null; (trap 'echo ended > {0}; exit' TERM; echo > {0}; \
         while :; do sleep 0.1; done); exit 8",
        ready.display()
    );
    let line = ["--listen", "127.0.0.1:0", "--resume-with", &command];
    let side = Side::start(arguments(line));
    send(&side.uri, &recording());
    assert_eq!(side.next(), Event::Connected);
    let (lost, _) = side.after_checkpoints();
    assert!(
        matches!(lost, Event::Lost { resumes: true, .. }),
        "{lost:?}"
    );
    assert!(matches!(side.next(), Event::Piped { .. }));
    while !ready.exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    side.stop();
    let Outcome::Resumed(_, Some(status)) = side.join() else {
        panic!("it was resumed");
    };
    assert_eq!(status.code(), Some(7));
    assert_eq!(std::fs::read_to_string(ready).unwrap(), "ended\n");
}

/// A standby whose disk of `--out` goes away, and comes back when `mount` is made again.
fn without_a_disk(more: &[&str]) -> (TempDir, PathBuf, Side) {
    let dir = tempfile::tempdir().unwrap();
    let mount = dir.path().join("mount");
    std::fs::create_dir(&mount).unwrap();
    let out = mount.join("vm.stream");
    let line = ["--listen", "127.0.0.1:0", "--out", out.to_str().unwrap()];
    let side = Side::start(arguments(line.iter().chain(more).copied()));
    std::fs::remove_dir(&mount).unwrap();
    (dir, mount, side)
}

#[test]
fn a_file_that_cannot_be_written_does_not_cost_the_resume() {
    let (_dir, _, side) = without_a_disk(&["--resume-with", "cat > /dev/null"]);
    send(&side.uri, &recording());
    assert_eq!(side.next(), Event::Connected);
    let (lost, Some(11)) = side.after_checkpoints() else {
        panic!("eleven checkpoints");
    };
    assert!(
        matches!(lost, Event::Lost { resumes: true, .. }),
        "{lost:?}"
    );
    assert!(matches!(side.next(), Event::NotWritten { .. }));
    assert!(matches!(side.next(), Event::Piped { .. }));
    let said = side.end().unwrap_err().to_string();
    assert!(said.starts_with("cannot write the stream to"), "{said}");
    assert!(said.contains("No such file"), "{said}");
}

#[test]
fn a_file_that_is_all_there_will_be_is_tried_until_it_is_written() {
    let (_dir, mount, side) = without_a_disk(&[]);
    send(&side.uri, &recording());
    assert_eq!(side.next(), Event::Connected);
    side.after_checkpoints();
    assert!(matches!(side.next(), Event::NotWritten { .. }));
    std::fs::create_dir(mount).unwrap();
    while !matches!(side.next(), Event::Written { .. }) {}
    assert_eq!(side.join(), Outcome::Resumed(Epoch(11), None));

    let (_dir, _, side) = without_a_disk(&[]);
    send(&side.uri, &recording());
    while !matches!(side.next(), Event::NotWritten { .. }) {}
    side.stop();
    side.end().unwrap_err();
}

#[test]
fn a_file_that_cannot_be_written_does_not_cost_the_standby() {
    let (_dir, mount, side) = without_a_disk(&[]);
    send(&side.uri, &rubbish());
    assert_eq!(side.next(), Event::Connected);
    let (lost, _) = side.after_checkpoints();
    assert!(
        matches!(lost, Event::Lost { resumes: false, .. }),
        "{lost:?}"
    );
    assert!(matches!(side.next(), Event::NotWritten { .. }));
    std::fs::create_dir(mount).unwrap();
    send(&side.uri, &recording());
    assert_eq!(side.join(), Outcome::Resumed(Epoch(11), None));
}

/// The primary starts anew, and its host dies in the migration. It ran on after the checkpoint that
/// is held, so that one is for the file alone.
#[test]
fn a_checkpoint_that_is_not_resumed_is_for_the_file_until_a_newer_one_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let resumed = dir.path().join("resumed");
    let command = format!("cat > {}", resumed.display());
    let out = dir.path().join("second");
    let line = ["--listen", "127.0.0.1:0", "--out", out.to_str().unwrap()];
    let side = Side::start(arguments(line));
    send(&side.uri, &rubbish());
    while !matches!(side.next(), Event::Written { .. }) {}
    let second = std::fs::read(out).unwrap();

    let (_dir, mount, side) = without_a_disk(&["--resume-with", &command]);
    let no_file = || loop {
        match side.after_checkpoints().0 {
            Event::NotWritten { .. } | Event::Connected => {}
            other => break other,
        }
    };
    let lost = |event, newest| matches!(event, Event::Lost { epoch, resumes: false, .. } if epoch == newest);
    send(&side.uri, &rubbish());
    assert!(lost(no_file(), Some(2)));
    send(&side.uri, &recording()[..migration() / 2]);
    assert!(lost(no_file(), None));
    std::fs::create_dir(&mount).unwrap();
    assert!(matches!(no_file(), Event::Written { .. }));
    assert!(std::fs::read(mount.join("vm.stream")).unwrap() == second);
    assert!(!resumed.exists());
    // Without a file once more, and the newer one is whole: the older one does not come back.
    std::fs::remove_dir_all(&mount).unwrap();
    send(&side.uri, &rubbish());
    assert!(lost(no_file(), Some(2)));
    let mut primary = connect(&side.uri);
    primary.write_all(&recording()[..migration()]).unwrap();
    primary.read_exact(&mut [0; 4]).unwrap();
    std::fs::create_dir(&mount).unwrap();
    drop(primary);
    let Event::Lost {
        epoch: Some(0),
        resumes: true,
        ..
    } = no_file()
    else {
        panic!("the newer one is resumed");
    };
    assert!(matches!(side.join(), Outcome::Resumed(Epoch(0), Some(_))));
    assert!(std::fs::read(mount.join("vm.stream")).unwrap() == std::fs::read(resumed).unwrap());
}
