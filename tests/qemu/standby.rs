//! A QEMU primary is protected by `colod standby`, dies, and its guest goes on elsewhere.

use colod::qemu::standby::{Event, Outcome};
use serde_json::json;

use crate::{
    for_each_version,
    side::Side,
    versions::Qemu,
    vm::{Machine, Vm, arguments, counters_in},
};

const CHECKPOINTS: u64 = 200;

fn two_hundred_checkpoints_then_the_guest_goes_on_from_the_last_one(qemu: Qemu) {
    if !qemu.can_run() {
        return;
    }
    let machine = Machine::dirty(qemu, 64);
    let stream = machine.path("vm.stream");
    // Stopped after loading, so that the counters can be compared exactly.
    let (listener, command) = machine.resume_command("-S");
    let out = stream.to_str().unwrap();
    let side = Side::start(arguments([
        "--listen",
        "127.0.0.1:0",
        "--out",
        out,
        "--resume-with",
        &command,
    ]));
    let mut primary = machine.start(&[]);
    primary.wait_until(|c| c.is_ready() && c.progress > 10);
    primary.protect(&side.uri, 10);
    loop {
        match side.next() {
            Event::Whole { epoch, .. } if epoch >= CHECKPOINTS => break,
            Event::Whole { .. } | Event::Connected | Event::Protected { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    primary.wait_until(|c| c.progress > 20);
    primary.kill();

    let (lost, newest) = side.after_checkpoints();
    let Event::Lost {
        epoch: Some(epoch),
        resumes: true,
        ..
    } = lost
    else {
        panic!("{lost:?}");
    };
    assert!(epoch >= newest.unwrap_or(CHECKPOINTS));
    goes_on(Vm::attach(&listener), &stream);
    let resumed = side.join();
    assert!(
        matches!(resumed, Outcome::Resumed(e, Some(status)) if e.0 == epoch && status.success()),
        "{resumed:?}"
    );
}

/// The state directory alone is enough, and the standby's death does not matter.
fn a_checkpoint_on_disk_is_resumed_without_the_standby_that_wrote_it(qemu: Qemu) {
    if !qemu.can_run() {
        return;
    }
    let machine = Machine::dirty(qemu, 64);
    let dir = machine.path("state");
    let dir = dir.to_str().unwrap();
    let side = Side::start(arguments(["--listen", "127.0.0.1:0", "--state", dir]));
    let mut primary = machine.start(&[]);
    primary.wait_until(|c| c.is_ready() && c.progress > 10);
    primary.protect(&side.uri, 10);
    while !matches!(side.next(), Event::Whole { epoch: 20.., .. }) {}
    drop(side);
    primary.kill();

    let stream = machine.path("vm.stream");
    let out = stream.to_str().unwrap();
    let (listener, command) = machine.resume_command("-S");
    let from_disk = Side::from_state(arguments([
        "--state",
        dir,
        "--from-state",
        "--out",
        out,
        "--resume-with",
        &command,
    ]));
    goes_on(Vm::attach(&listener), &stream);
    let outcome = from_disk.join();
    assert!(matches!(outcome, Outcome::Resumed(e, Some(_)) if e.0 >= 20));
}

/// A process that hangs keeps its connection alive: only its silence tells.
fn a_primary_that_hangs_between_checkpoints_is_lost_after_the_idle_silence(qemu: Qemu) {
    if !qemu.can_run() {
        return;
    }
    let machine = Machine::dirty(qemu, 64);
    let stream = machine.path("vm.stream");
    let out = stream.to_str().unwrap();
    let (listener, command) = machine.resume_command("-S");
    let side = Side::start(arguments([
        "--listen",
        "127.0.0.1:0",
        "--idle-silence",
        "2000",
        "--silence",
        "2000",
        "--out",
        out,
        "--resume-with",
        &command,
    ]));
    let mut primary = machine.start(&[]);
    primary.wait_until(|c| c.is_ready() && c.progress > 10);
    primary.protect(&side.uri, 10);
    while !matches!(side.next(), Event::Whole { epoch: 5.., .. }) {}
    primary.hang();
    let (lost, _) = side.after_checkpoints();
    let Event::Lost {
        reason, resumes, ..
    } = lost
    else {
        panic!("{lost:?}");
    };
    assert!(resumes && reason.contains("silent"), "{reason}");
    goes_on(Vm::attach(&listener), &stream);
    side.join();
}

/// The resumed guest stands exactly where the stream says, and runs on without a fault.
pub(crate) fn goes_on(mut resumed: Vm, stream: &std::path::Path) {
    let held = counters_in(stream);
    assert!(held.is_ready() && held.errors == 0, "{held:?}");
    loop {
        let status = resumed.qmp.run("query-status", json!({}));
        match status["status"].as_str().unwrap() {
            "inmigrate" => std::thread::sleep(std::time::Duration::from_millis(10)),
            "paused" | "prelaunch" => break,
            other => panic!("{other}"),
        }
    }
    assert_eq!(resumed.counters(), held);
    resumed.qmp.run("cont", json!({}));
    // Long enough that every page of its working set is checked again.
    resumed.wait_until(|c| c.verified > held.verified + 2048 && c.progress > held.progress + 10);
    resumed.quit();
}

for_each_version!(
    two_hundred_checkpoints_then_the_guest_goes_on_from_the_last_one,
    a_checkpoint_on_disk_is_resumed_without_the_standby_that_wrote_it,
    a_primary_that_hangs_between_checkpoints_is_lost_after_the_idle_silence,
);
