//! A VM without protection serves, can be stopped and continued, and ends when it is told to.

use serde_json::json;

use colo_driver_mio::demo::{Host, now};

use crate::common::*;

#[test]
fn the_server_guest_answers_and_quits() {
    if !kvm() {
        return;
    }
    let _alone = alone();
    let mut stage = stage();
    let mut vm = stage.start(Host::A, "run").unwrap();
    let client = client(&mut stage);
    let first = client
        .answer_after(0, PATIENCE)
        .unwrap_or_else(|| panic!("{}", vm.log()));
    let mut since = first.first_byte;
    for _ in 0..100 {
        since = client.answer_after(since, PATIENCE).unwrap().first_byte;
    }
    vm.execute("stop", json!({})).unwrap();
    vm.execute("cont", json!({})).unwrap();
    assert!(client.answer_after(now(), PATIENCE).is_some());
    served(client);
    vm.execute("quit", json!({})).unwrap();
    assert!(vm.wait_end(PATIENCE).unwrap().success());
    assert!(!vm.control().exists(), "no socket is left");
}
