//! The guest runs, stops and goes on.

mod common;

use colo_driver_kvm::vm::VmConfig;
use common::{Walk, await_visits, contradictions, host, machine, visits};

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
