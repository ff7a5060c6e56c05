//! A machine goes to a file and comes back; a bad file is refused and changes nothing.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::fs;
use std::os::unix::{fs::FileTypeExt, net::UnixListener};

use colo_driver_kvm::snapshot::SnapshotError;
use colo_driver_kvm::vm::{Vm, VmConfig};
use common::{Walk, await_visits, contradictions, host, machine, visits};

#[test]
fn a_restored_machine_goes_on_where_it_was_saved() {
    let Some(host) = host() else { return };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.snap");
    let mut vm = machine(&host, &VmConfig::default(), Walk::default());
    vm.resume().unwrap();
    await_visits(&vm, 0, 10_000);
    vm.save(&path).unwrap();
    let saved = visits(&vm, 0);
    let files = fs::read_dir(directory.path()).unwrap().count();
    assert_eq!(files, 1, "no part of it is left beside it");
    assert!(
        fs::metadata(&path).unwrap().len() < 16 << 20,
        "zero pages are not in the file"
    );

    // Into a machine that went on meanwhile, and into a fresh one.
    vm.resume().unwrap();
    await_visits(&vm, 0, saved + 10_000);
    vm.restore(&path).unwrap();
    let mut fresh = Vm::new(&host, &VmConfig::default()).unwrap();
    fresh.restore(&path).unwrap();
    for vm in [&mut vm, &mut fresh] {
        assert_eq!(visits(vm, 0), saved);
        vm.resume().unwrap();
        await_visits(vm, 0, saved + 10_000);
        vm.pause();
        assert_eq!(contradictions(vm), []);
    }
}

#[test]
fn a_bad_file_is_refused_and_the_machine_runs_on() {
    let Some(host) = host() else { return };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.snap");
    let mut vm = machine(&host, &VmConfig::default(), Walk::default());
    vm.resume().unwrap();
    await_visits(&vm, 0, 1000);
    vm.save(&path).unwrap();
    vm.resume().unwrap();
    let good = fs::read(&path).unwrap();

    let mut check = |bytes: &[u8], what: &str| {
        fs::write(&path, bytes).unwrap();
        let error = vm.restore(&path).unwrap_err().to_string();
        assert!(error.contains(what), "{error:?} does not say {what:?}");
        assert!(vm.running());
        let count = visits(&vm, 0);
        await_visits(&vm, 0, count + 1000);
    };
    check(b"#!/bin/sh", "is not a snapshot");
    check(b"", "is not a snapshot");
    check(&good[..10], "its head is cut");
    check(&good[..good.len() - 1], "the file ends early");
    check(&good[..good.len() / 2], "the file ends early");
    let mut flipped = good.clone();
    flipped[9] ^= 1;
    check(&flipped, "checksum");
    for at in [23, 100, 4000] {
        let mut flipped = good.clone();
        flipped[at] ^= 0x10;
        // Within the state: a section, or the frame around it.
        check(&flipped, "vm.snap: ");
    }
    for at in [good.len() / 2, good.len() - 5000, good.len() - 3] {
        let mut flipped = good.clone();
        flipped[at] ^= 1;
        check(&flipped, "is damaged at byte");
    }
    let mut longer = good.clone();
    longer.push(0);
    check(&longer, "bytes follow the end mark");

    // And the good one is still good.
    fs::write(&path, &good).unwrap();
    vm.restore(&path).unwrap();
}

#[test]
fn a_socket_is_not_replaced_by_a_snapshot() {
    let Some(host) = host() else { return };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("c.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    let mut vm = Vm::new(&host, &VmConfig::default()).unwrap();
    let error = vm.save(&path).unwrap_err();
    assert!(matches!(error, SnapshotError::NotAFile { .. }), "{error}");
    assert!(fs::metadata(&path).unwrap().file_type().is_socket());
}

#[test]
fn a_snapshot_of_another_machine_is_refused_by_name() {
    let Some(host) = host() else { return };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.snap");
    let mut vm = machine(&host, &VmConfig::default(), Walk::default());
    vm.save(&path).unwrap();
    let other = |config: VmConfig| {
        let error = Vm::new(&host, &config).unwrap().restore(&path).unwrap_err();
        assert!(matches!(error, SnapshotError::State { .. }));
        error.to_string()
    };
    let config = VmConfig::default;
    assert!(
        other(VmConfig {
            memory: 64 << 20,
            ..config()
        })
        .contains("slot's pages is 0x8000 there and 0x4000 here")
    );
    assert!(
        other(VmConfig {
            vcpus: 2,
            ..config()
        })
        .contains("number of vCPUs is 0x1 there")
    );
}
