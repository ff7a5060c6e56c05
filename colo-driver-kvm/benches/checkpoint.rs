//! How long the primary stands still, and how long the secondary takes to become its copy.
//!
//! `cargo bench -p colo-driver-kvm --bench checkpoint [-- EPOCHS]`. Times are in µs, from the
//! decision to stop until every vCPU is about to enter the guest again.
#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::{Duration, Instant};

use colo_driver_kvm::caps::Host;
use colo_driver_kvm::checkpoint::{CaptureTimes, Captured, Passes};
use colo_driver_kvm::dirty::DirtyMode;
use colo_driver_kvm::vm::{Vm, VmConfig};
use colo_proto::id::PageRuns;
use colo_proto::ram::PageSet;
use common::{Walk, await_visits, boot, contradictions, host};

struct Case {
    name: &'static str,
    vcpus: usize,
    memory: u64,
    /// Of each vCPU.
    pages_per_ms: u64,
    ws: u64,
    passes: Passes,
    dirty: DirtyMode,
    epoch: Duration,
    promise: &'static str,
}

const EPOCH: Duration = Duration::from_millis(100);

fn cases() -> Vec<Case> {
    let case = |name, memory, pages_per_ms, ws, passes, promise| Case {
        name,
        vcpus: 1,
        memory,
        pages_per_ms,
        ws,
        passes,
        dirty: DirtyMode::Bitmap,
        epoch: EPOCH,
        promise,
    };
    let ring = DirtyMode::Ring(65_536);
    let quick = Duration::from_millis(10);
    let (half, two) = (512 << 20, Passes::Two);
    vec![
        Case {
            epoch: quick,
            ..case("idle 128 MiB", 128 << 20, 0, 0, two, "500 / 1000")
        },
        Case {
            epoch: quick,
            ..case("idle 4 GiB", 4 << 30, 0, 0, two, "as above + 200")
        },
        Case {
            epoch: quick,
            dirty: ring,
            ..case("idle 4 GiB, ring", 4 << 30, 0, 0, two, "")
        },
        case("4,096 pages, 2 passes", half, 41, 16_384, two, "800 / 2000"),
        case("4,096 pages, 1 pass", half, 41, 16_384, Passes::One, "3000"),
        case("16,384 pages, 2 passes", half, 164, 49_152, two, "2000"),
        Case {
            dirty: ring,
            ..case("16,384 pages, 2, ring", half, 164, 49_152, two, "")
        },
        case("16,384 pages, 1 pass", half, 164, 49_152, Passes::One, ""),
        Case {
            vcpus: 2,
            ..case("4,096 pages, 2 vCPUs", half, 20, 8_192, two, "")
        },
        Case {
            vcpus: 4,
            ..case("4,096 pages, 4 vCPUs", half, 10, 4_096, two, "")
        },
    ]
}

fn main() {
    let epochs = std::env::args()
        .filter_map(|a| a.parse().ok())
        .next()
        .unwrap_or(60);
    let Some(host) = host() else { return };
    println!(
        "{:24} {:>7} {:>7} {:>7} {:>7} {:>14} | {:>6} {:>6} {:>7} {:>6} {:>6} {:>7} | {:>8} {:>7}",
        "case (µs)",
        "pages",
        "median",
        "p99",
        "max",
        "promise",
        "kick",
        "log",
        "copy",
        "state",
        "resume",
        "stopped",
        "pass 1",
        "live"
    );
    for case in cases() {
        run(&host, &case, epochs);
    }
    commit(&host);
}

fn running(host: &Host, case: &Case) -> Vm {
    let config = VmConfig {
        vcpus: case.vcpus,
        memory: case.memory,
        dirty: case.dirty,
        ..VmConfig::default()
    };
    let mut vm = Vm::new(host, &config).unwrap();
    let walk = Walk {
        pages: case.pages_per_ms,
        ws: case.ws,
        period: u64::from(vm.shape().tsc_khz),
        cpus: case.vcpus as u64,
        ..Walk::default()
    };
    boot(&mut vm, walk);
    vm.resume().unwrap();
    for vcpu in 0..walk.cpus {
        await_visits(&vm, vcpu, case.ws);
    }
    vm.start_tracking().unwrap();
    // What the first synchronisation would do.
    let mut all = PageSet::new(&vm.memory().shape());
    vm.harvest(&mut all).unwrap();
    vm
}

fn run(host: &Host, case: &Case, epochs: usize) {
    let epochs = if case.epoch < EPOCH {
        epochs * 8
    } else {
        epochs
    };
    let mut vm = running(host, case);
    let mut checkpoint = vm.checkpoint(65_536).unwrap();
    let none = PageRuns::new();
    let mut all: Vec<(Captured, u64)> = Vec::new();
    for epoch in 0..epochs + 3 {
        std::thread::sleep(case.epoch);
        let captured = vm
            .capture(&mut checkpoint, &none, true, case.passes, &mut || {})
            .unwrap();
        // The first ones grow the buffers.
        if epoch >= 3 {
            all.push((captured, checkpoint.dirty.count()));
        }
    }
    vm.pause();
    assert_eq!(contradictions(&vm), []);
    let times = |what: fn(&CaptureTimes) -> Duration| -> Vec<u128> {
        let mut all: Vec<_> = all
            .iter()
            .map(|(c, _)| what(&c.times).as_micros())
            .collect();
        all.sort_unstable();
        all
    };
    let median = |what: fn(&CaptureTimes) -> Duration| percentile(&times(what), 50);
    let pause = times(|t| t.pause);
    let middle = |mut v: Vec<u64>| {
        v.sort_unstable();
        v[v.len() / 2]
    };
    println!(
        "{:24} {:>7} {:>7} {:>7} {:>7} {:>14} | {:>6} {:>6} {:>7} {:>6} {:>6} {:>7} | {:>8} {:>7}",
        case.name,
        middle(all.iter().map(|(_, n)| *n).collect()),
        percentile(&pause, 50),
        percentile(&pause, 99),
        pause.last().unwrap(),
        case.promise,
        median(|t| t.kick),
        median(|t| t.collect),
        median(|t| t.copy),
        median(|t| t.save),
        median(|t| t.resume),
        middle(all.iter().map(|(c, _)| c.stopped_pages.into()).collect()),
        median(|t| t.pass1),
        middle(all.iter().map(|(c, _)| c.live_pages.into()).collect()),
    );
}

/// A secondary that runs, stops, takes 2,560 pages and the state, and runs again.
fn commit(host: &Host) {
    let mut primary = Vm::new(host, &VmConfig::default()).unwrap();
    let walk = Walk {
        pages: 26,
        ws: 10_240,
        period: u64::from(primary.shape().tsc_khz),
        ..Walk::default()
    };
    boot(&mut primary, walk);
    let mut secondary = Vm::new(host, &VmConfig::default()).unwrap();
    primary.start_tracking().unwrap();
    secondary.start_tracking().unwrap();
    primary.resume().unwrap();
    let mut checkpoint = primary.checkpoint(40_000).unwrap();
    let mut theirs = PageSet::new(&primary.memory().shape());
    let mut found = Vec::new();
    let (mut commits, mut loads, mut alls) = (vec![], vec![], vec![]);
    for round in 0..60 {
        std::thread::sleep(EPOCH);
        theirs.clear();
        if round > 0 {
            secondary.harvest(&mut theirs).unwrap();
        }
        let also = theirs.take_runs(u32::MAX, usize::MAX);
        primary
            .capture(&mut checkpoint, &also, true, Passes::Two, &mut || {})
            .unwrap();
        let pages = checkpoint.dirty.count();
        let runs = checkpoint.dirty.take_runs(u32::MAX, usize::MAX);
        let begin = Instant::now();
        secondary.pause();
        let paused = Instant::now();
        secondary.commit_ram(&checkpoint.staging, &runs).unwrap();
        let committed = Instant::now();
        secondary.load_state(&checkpoint.state).unwrap();
        let loaded = Instant::now();
        secondary.resume().unwrap();
        let end = Instant::now();
        // It stands still again at once: what it wrote in between is asked for above.
        secondary.pause();
        if round == 0 {
            secondary.harvest(&mut theirs).unwrap();
        }
        if round >= 3 {
            found.push(u128::from(pages));
            commits.push((committed - paused).as_micros());
            loads.push((loaded - committed).as_micros());
            alls.push((end - begin).as_micros());
        }
        assert_eq!(contradictions(&secondary), []);
    }
    for v in [&mut found, &mut commits, &mut loads, &mut alls] {
        v.sort_unstable();
    }
    println!(
        "commit of {} pages: copy {} + state {} (p99 {} + {}), with resume {} (p99 {}); promise 2000",
        percentile(&found, 50),
        percentile(&commits, 50),
        percentile(&loads, 50),
        percentile(&commits, 99),
        percentile(&loads, 99),
        percentile(&alls, 50),
        percentile(&alls, 99),
    );
}

fn percentile(sorted: &[u128], percent: usize) -> u128 {
    sorted[(sorted.len() - 1) * percent / 100]
}
