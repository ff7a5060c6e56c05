//! What the tests on a real KVM share.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(unreachable_pub, reason = "shared by several test binaries")]

pub mod guest;

use std::time::{Duration, Instant};

use colo_driver_kvm::boot::Boot;
use colo_driver_kvm::caps::Host;
use colo_driver_kvm::vm::{Vm, VmConfig};
use vm_memory::{Bytes, GuestAddress};

pub use guest::Walk;

/// This host's KVM, or `None` after saying why not. `COLO_REQUIRE=kvm` makes that a failure.
pub fn host() -> Option<Host> {
    match Host::open() {
        Ok(host) => Some(host),
        Err(why) => {
            let required = std::env::var("COLO_REQUIRE").unwrap_or_default();
            assert!(
                !required.split(',').any(|r| r == "kvm"),
                "COLO_REQUIRE names kvm, but: {why}"
            );
            println!("SKIPPED: {why}");
            None
        }
    }
}

/// A paused VM with the walking guest in it.
pub fn machine(host: &Host, config: &VmConfig, walk: Walk) -> Vm {
    let mut vm = Vm::new(host, config).unwrap();
    boot(&mut vm, walk);
    vm
}

/// Puts the walking guest into a VM.
pub fn boot(vm: &mut Vm, walk: Walk) {
    let boot = Boot {
        kernel: &guest::image(walk),
        initrd: None,
        cmdline: "",
    };
    vm.boot(&boot).unwrap();
}

fn word(vm: &Vm, at: u64) -> u64 {
    vm.memory().ram().read_obj(GuestAddress(at)).unwrap()
}

/// Visits that a vCPU has made.
pub fn visits(vm: &Vm, vcpu: u64) -> u64 {
    word(vm, 0x1000 + 64 * vcpu)
}

/// Contradictions that any of the first 8 vCPUs found in its memory, with the first one's page.
pub fn contradictions(vm: &Vm) -> Vec<(u64, u64, u64)> {
    (0..8)
        .map(|n| 0x1000 + 64 * n)
        .filter(|at| word(vm, at + 16) != 0)
        .map(|at| (word(vm, at + 16), word(vm, at + 24), word(vm, at + 32)))
        .collect()
}

/// Waits until `vcpu` has made more than `count` visits, as the guest reports them.
pub fn await_visits(vm: &Vm, vcpu: u64, count: u64) {
    let begin = Instant::now();
    while visits(vm, vcpu) <= count {
        let events = vm.take_events();
        assert!(events.is_empty(), "{events:?}");
        assert!(
            begin.elapsed() < Duration::from_secs(20),
            "vCPU {vcpu} stands at {} visits",
            visits(vm, vcpu)
        );
        std::thread::yield_now();
    }
}
