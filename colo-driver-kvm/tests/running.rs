//! The guest runs, stops and goes on.

mod common;

use colo_driver_kvm::dirty::DirtyMode;
use colo_driver_kvm::vm::{Vm, VmConfig};
use colo_proto::ram::PageSet;
use common::{Walk, await_visits, contradictions, host, machine, visits};
use vm_memory::{Bytes, GuestAddress};

#[test]
fn a_paused_guest_stands_still_and_goes_on_after() {
    let Some(host) = host() else { return };
    let mut vm = machine(&host, &VmConfig::default(), Walk::default());
    vm.resume().unwrap();
    await_visits(&vm, 0, 10_000);
    vm.pause();
    let before = visits(&vm, 0);
    let mut state = Vec::new();
    vm.save_state(&mut state).unwrap();
    assert_eq!(visits(&vm, 0), before);
    vm.resume().unwrap();
    await_visits(&vm, 0, before + 10_000);
    vm.pause();
    assert_eq!(contradictions(&vm), []);
}

#[test]
fn sixty_four_gib_are_addressable_around_the_hole() {
    let Some(host) = host() else { return };
    let config = VmConfig {
        memory: 64 << 30,
        ..VmConfig::default()
    };
    let mut vm = machine(&host, &config, Walk::default());
    let last = GuestAddress((65 << 30) - 8);
    let hole = GuestAddress(0xc000_0000);
    let ram = vm.memory().ram().clone();
    ram.write_obj(7u64, last).unwrap();
    assert!(ram.write_obj(7u64, hole).is_err());
    vm.start_tracking().unwrap();
    let mut set = PageSet::new(&vm.memory().shape());
    vm.harvest(&mut set).unwrap();
    assert_eq!(set.count(), (64 << 30) / 4096);
    vm.resume().unwrap();
    await_visits(&vm, 0, 1000);
}

#[test]
fn what_a_host_cannot_give_is_refused_with_a_reason() {
    let Some(host) = host() else { return };
    let why = |config: VmConfig| Vm::new(&host, &config).unwrap_err().to_string();
    let config = VmConfig::default;
    assert_eq!(
        why(VmConfig {
            vcpus: 9,
            ..config()
        }),
        "9 vCPUs: choose 1 to 8"
    );
    assert_eq!(
        why(VmConfig {
            vcpus: 0,
            ..config()
        }),
        "0 vCPUs: choose 1 to 8"
    );
    assert!(
        why(VmConfig {
            memory: 1 << 52,
            ..config()
        })
        .ends_with("give the guest less memory")
    );
    assert!(
        why(VmConfig {
            dirty: DirtyMode::Ring(1000),
            ..config()
        })
        .ends_with("choose the bitmap or a smaller ring")
    );
}
