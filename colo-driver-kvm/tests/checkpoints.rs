//! Checkpoints of a running guest that checks its own memory.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::num::NonZeroU32;

use colo_driver_kvm::checkpoint::{Checkpoint, Passes};
use colo_driver_kvm::dirty::DirtyMode;
use colo_driver_kvm::state;
use colo_driver_kvm::vm::{Vm, VmConfig};
use colo_proto::id::{PageRun, PageRuns, Slot};
use colo_proto::ram::PageSet;
use common::{Walk, await_visits, boot, contradictions, host, machine, visits};
use vm_memory::GuestMemoryBackend as _;

fn ring(entries: u32) -> VmConfig {
    VmConfig {
        dirty: DirtyMode::Ring(entries),
        ..VmConfig::default()
    }
}

fn modes() -> [VmConfig; 2] {
    [VmConfig::default(), ring(65_536)]
}

fn runs(set: &PageSet) -> PageRuns {
    set.clone().take_runs(u32::MAX, usize::MAX)
}

/// Turns `to` into the captured machine.
fn restore(to: &mut Vm, from: &Checkpoint) {
    to.commit_ram(&from.staging, &runs(&from.dirty)).unwrap();
    to.load_state(&from.state).unwrap();
}

#[test]
fn state_saved_loaded_and_saved_again_is_the_same() {
    let Some(host) = host() else { return };
    for config in modes() {
        let mut one = machine(&host, &config, Walk::default());
        one.start_tracking().unwrap();
        one.resume().unwrap();
        await_visits(&one, 0, 1000);
        let mut first = one.checkpoint(40_000).unwrap();
        one.capture(&mut first, &PageRuns::new(), false, Passes::One, &mut || {})
            .unwrap();

        let mut other = Vm::new(&host, &config).unwrap();
        restore(&mut other, &first);
        let mut again = Vec::new();
        other.save_state(&mut again).unwrap();

        let before = state::sections(&first.state).unwrap();
        let after = state::sections(&again).unwrap();
        assert_eq!(before.len(), after.len());
        for (before, after) in before.iter().zip(&after) {
            // Time goes on in between; nothing else may differ.
            if before.name == "time" {
                continue;
            }
            assert!(before == after, "section {} differs", before.name);
        }
        // And the copy is alive.
        let count = visits(&other, 0);
        assert!(count >= 1000);
        other.resume().unwrap();
        await_visits(&other, 0, count + 10_000);
        assert_eq!(contradictions(&other), []);
    }
}

#[test]
fn a_running_guest_is_checkpointed_and_restored_thousands_of_times() {
    let Some(host) = host() else { return };
    let cycles: u32 = std::env::var("COLO_CYCLES")
        .ok()
        .map_or(1000, |n| n.parse().unwrap());
    for config in modes() {
        let walk = Walk {
            pages: 4,
            ws: 200,
            ..Walk::default()
        };
        let mut primary = machine(&host, &config, walk);
        let mut secondary = Vm::new(&host, &config).unwrap();
        primary.start_tracking().unwrap();
        secondary.start_tracking().unwrap();
        let shape = primary.memory().shape();
        let mut theirs = PageSet::new(&shape);
        let mut checkpoint = primary.checkpoint(40_000).unwrap();
        primary.resume().unwrap();
        secondary.harvest(&mut theirs).unwrap();
        theirs.clear();
        for cycle in 0..cycles {
            // The secondary runs too, and dirties pages of its own: the primary sends those as well.
            secondary.pause();
            secondary.harvest(&mut theirs).unwrap();
            let also = runs(&theirs);
            theirs.clear();
            let passes = if cycle % 2 == 0 {
                Passes::Two
            } else {
                Passes::One
            };
            primary
                .capture(&mut checkpoint, &also, true, passes, &mut || {})
                .unwrap();
            restore(&mut secondary, &checkpoint);
            secondary.resume().unwrap();
            assert_eq!(contradictions(&secondary), [], "cycle {cycle}");
        }
        let count = visits(&secondary, 0);
        await_visits(&secondary, 0, count + 100_000);
        primary.pause();
        secondary.pause();
        assert_eq!(contradictions(&primary), []);
        assert_eq!(contradictions(&secondary), []);
        assert!(count > u64::from(cycles), "the guest made progress");
    }
}

#[test]
fn a_copy_that_misses_a_page_is_found_by_the_guest() {
    let Some(host) = host() else { return };
    let mut vm = machine(&host, &VmConfig::default(), Walk::default());
    vm.start_tracking().unwrap();
    vm.resume().unwrap();
    await_visits(&vm, 0, 2000);
    let mut checkpoint = vm.checkpoint(40_000).unwrap();
    let none = PageRuns::new();
    vm.capture(&mut checkpoint, &none, false, Passes::One, &mut || {})
        .unwrap();
    let missed = PageRun {
        slot: Slot(0),
        first: 1024 + 77,
        pages: NonZeroU32::MIN,
    };
    assert!(checkpoint.dirty.remove(missed));
    let mut copy = Vm::new(&host, &VmConfig::default()).unwrap();
    restore(&mut copy, &checkpoint);
    let count = visits(&copy, 0);
    copy.resume().unwrap();
    await_visits(&copy, 0, count + 2000);
    copy.pause();
    let found = contradictions(&copy);
    assert_eq!(found.len(), 1);
    let page = (4 << 30) + (1024 + 77) * 4096;
    assert_eq!(found[0].1, page, "it names the page");
}

#[test]
fn memory_above_the_hole_and_at_the_very_end_is_carried_over() {
    let Some(host) = host() else { return };
    let huge = VmConfig {
        memory: 64 << 30,
        ..VmConfig::default()
    };
    let mut vm = Vm::new(&host, &huge).unwrap();
    let walk = Walk {
        // To the last byte of 64 GiB, of which some lie above the hole for devices.
        base: vm.memory().ram().last_addr().0 + 1 - 512 * 4096,
        ws: 512,
        ..Walk::default()
    };
    assert!(walk.base > 64 << 30);
    vm.start_tracking().unwrap();
    let mut everything = PageSet::new(&vm.memory().shape());
    vm.harvest(&mut everything).unwrap();
    boot(&mut vm, walk);
    vm.resume().unwrap();
    await_visits(&vm, 0, 2 * walk.ws);
    let mut checkpoint = vm.checkpoint(4_000).unwrap();
    let none = PageRuns::new();
    vm.capture(&mut checkpoint, &none, false, Passes::Two, &mut || {})
        .unwrap();
    let count = visits(&vm, 0);
    drop(vm);

    let mut copy = Vm::new(&host, &huge).unwrap();
    restore(&mut copy, &checkpoint);
    assert!(visits(&copy, 0) >= count);
    copy.resume().unwrap();
    await_visits(&copy, 0, count + 2 * walk.ws);
    copy.pause();
    assert_eq!(contradictions(&copy), []);
}
