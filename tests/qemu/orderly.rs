//! The ends of a primary that look like its death on the wire: with `--primary-qmp` no second guest
//! starts after them; without it the fence runs first and must succeed.

use std::path::Path;

use colod::qemu::standby::{Event, Outcome};
use serde_json::json;

use crate::{
    for_each_version,
    side::Side,
    versions::Qemu,
    vm::{Machine, Vm, arguments},
};

/// A protected primary with a second monitor, and its standby.
fn protected(machine: &Machine, resumed: &Path) -> (Vm, Side) {
    let socket = machine.path("second-qmp");
    let monitor = format!("unix:{},server=on,wait=off", socket.display());
    let mut primary = machine.start(&["-qmp", &monitor]);
    primary.wait_until(|c| c.is_ready() && c.progress > 10);
    let command = format!("cat > {}", resumed.display());
    let side = Side::start(arguments([
        "--listen",
        "127.0.0.1:0",
        "--resume-with",
        &command,
        "--primary-qmp",
        &format!("unix:{}", socket.display()),
    ]));
    primary.protect(&side.uri, 50);
    while !matches!(side.next(), Event::Whole { epoch: 3.., .. }) {}
    (primary, side)
}

fn not_resumed(qemu: Qemu, end: impl FnOnce(&mut Vm), says: &str) {
    if !qemu.can_run() {
        return;
    }
    let machine = Machine::dirty(qemu, 64);
    let resumed = machine.path("resumed");
    let (mut primary, side) = protected(&machine, &resumed);
    end(&mut primary);
    let (lost, _) = side.after_checkpoints();
    let Event::Lost {
        reason,
        epoch: Some(_),
        resumes,
    } = lost
    else {
        panic!("{lost:?}");
    };
    assert!(!resumes && reason.contains(says), "{reason}");
    side.stop();
    assert_eq!(side.join(), Outcome::Stopped);
    assert!(!resumed.exists());
}

fn a_primary_whose_migration_is_cancelled_keeps_its_guest(qemu: Qemu) {
    let cancel = |primary: &mut Vm| drop(primary.qmp.run("migrate_cancel", json!({})));
    not_resumed(qemu, cancel, "its guest runs");
}

fn a_primary_that_is_told_to_go_on_alone_keeps_its_guest(qemu: Qemu) {
    let alone = |primary: &mut Vm| drop(primary.qmp.run("x-colo-lost-heartbeat", json!({})));
    not_resumed(qemu, alone, "its guest runs");
}

fn a_primary_that_quits_has_ended_in_good_order(qemu: Qemu) {
    let quit = |primary: &mut Vm| drop(primary.qmp.run("quit", json!({})));
    not_resumed(qemu, quit, "it ended in good order (host-qmp-quit)");
}

/// The machine has `-no-reboot`.
fn a_guest_that_resets_has_ended_in_good_order(qemu: Qemu) {
    let reset = |primary: &mut Vm| drop(primary.qmp.run("system_reset", json!({})));
    not_resumed(qemu, reset, "it ended in good order (");
}

/// Its monitor is gone with it.
fn a_primary_that_is_killed_is_taken_over_from(qemu: Qemu) {
    if !qemu.can_run() {
        return;
    }
    let machine = Machine::dirty(qemu, 64);
    let resumed = machine.path("resumed");
    let (primary, side) = protected(&machine, &resumed);
    primary.kill();
    let (lost, _) = side.after_checkpoints();
    assert!(
        matches!(lost, Event::Lost { resumes: true, .. }),
        "{lost:?}"
    );
    assert!(matches!(side.join(), Outcome::Resumed(_, Some(status)) if status.success()));
    assert!(resumed.exists());
}

for_each_version!(
    a_primary_whose_migration_is_cancelled_keeps_its_guest,
    a_primary_that_is_told_to_go_on_alone_keeps_its_guest,
    a_primary_that_quits_has_ended_in_good_order,
    a_guest_that_resets_has_ended_in_good_order,
    a_primary_that_is_killed_is_taken_over_from,
);
