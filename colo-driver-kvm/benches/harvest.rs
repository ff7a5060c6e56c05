//! Bitmap against ring, by RAM size and dirtiness: what it costs to learn which pages changed.
//!
//! `cargo bench -p colo-driver-kvm --bench harvest`. Times are medians in µs of one harvest (take
//! the log and protect again) while the guest stands; the last column is the guest's own progress.
#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::{Duration, Instant};

use colo_driver_kvm::caps::Host;
use colo_driver_kvm::dirty::DirtyMode;
use colo_driver_kvm::vm::{Vm, VmConfig};
use colo_proto::ram::PageSet;
use common::{Walk, await_visits, boot, host, visits};

fn main() {
    let Some(host) = host() else { return };
    println!(
        "{:>9} {:>12} {:>8} | {:>10} {:>8} {:>8} | {:>10}",
        "RAM", "dirty/10 ms", "mode", "harvest", "pages", "ns/page", "visits/ms"
    );
    for memory in [128 << 20, 1 << 30, 4 << 30, 16 << 30] {
        for pages in [0, 25, 250, 2500] {
            for mode in [DirtyMode::Bitmap, DirtyMode::Ring(65_536)] {
                measure(&host, memory, pages, mode);
            }
        }
    }
}

fn measure(host: &Host, memory: u64, pages_per_ms: u64, dirty: DirtyMode) {
    let config = VmConfig {
        memory,
        dirty,
        ..VmConfig::default()
    };
    let mut vm = Vm::new(host, &config).unwrap();
    let walk = Walk {
        pages: pages_per_ms,
        ws: 25_000,
        period: u64::from(vm.shape().tsc_khz),
        ..Walk::default()
    };
    boot(&mut vm, walk);
    vm.resume().unwrap();
    await_visits(&vm, 0, if pages_per_ms == 0 { 0 } else { walk.ws });
    vm.start_tracking().unwrap();
    let mut set = PageSet::new(&vm.memory().shape());
    vm.harvest(&mut set).unwrap();
    let mut times = Vec::new();
    let mut found = Vec::new();
    let before = visits(&vm, 0);
    let begin = Instant::now();
    for _ in 0..25 {
        std::thread::sleep(Duration::from_millis(10));
        vm.pause();
        set.clear();
        let begin = Instant::now();
        vm.harvest(&mut set).unwrap();
        times.push(begin.elapsed().as_nanos());
        found.push(set.count());
        vm.resume().unwrap();
    }
    let rate = (visits(&vm, 0) - before) as f64 / begin.elapsed().as_millis() as f64;
    times.sort_unstable();
    found.sort_unstable();
    let (time, pages) = (times[times.len() / 2], found[found.len() / 2]);
    println!(
        "{:>5} MiB {:>12} {:>8} | {:>10.1} {:>8} {:>8.1} | {:>10.1}",
        memory >> 20,
        pages_per_ms * 10,
        if dirty == DirtyMode::Bitmap {
            "bitmap"
        } else {
            "ring"
        },
        time as f64 / 1000.0,
        pages,
        time as f64 / pages.max(1) as f64,
        rate,
    );
}
