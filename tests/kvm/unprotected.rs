//! A VM without protection serves, can be stopped and continued, and ends when it is told to.

use serde_json::json;

use colod::demo::{Host, now};

use crate::common::*;

#[test]
fn the_server_guest_answers_and_quits() {
    let Some(_alone) = alone() else { return };
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

#[test]
fn a_saved_vm_goes_on_where_it_was_and_a_damaged_file_is_refused() {
    let Some(_alone) = alone() else { return };
    let mut stage = stage();
    let mut vm = stage.start(Host::A, "run").unwrap();
    let worker = client(&mut stage);
    assert!(worker.answer_after(0, PATIENCE).is_some(), "{}", vm.log());
    let report = served(worker);
    let last = report.answers.last().unwrap().counter.unwrap();
    let file = stage.directory().join("vm.state");
    let path = file.to_str().unwrap().to_owned();
    vm.execute("save", json!({ "file": path })).unwrap();
    vm.execute("quit", json!({})).unwrap();
    assert!(vm.wait_end(PATIENCE).unwrap().success());

    let restored = stage.start_with(Host::B, "restore", &[&path]).unwrap();
    let worker = client(&mut stage);
    let first = worker
        .answer_after(0, PATIENCE)
        .unwrap_or_else(|| panic!("{}", restored.log()));
    assert_eq!(first.counter, Some(last + 1), "it goes on counting");
    served(worker);
    drop(restored);

    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let mut refused = stage.start_with(Host::B, "restore", &[&path]).unwrap();
    assert_eq!(refused.wait_end(PATIENCE).unwrap().code(), Some(1));
    assert!(refused.log().contains("vm.state"), "{}", refused.log());
}
