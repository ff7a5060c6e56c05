//! A QEMU secondary takes a recorded session from `colod feed`, and runs on when told that its
//! primary is lost.

use clap::Parser;
use colod::qemu::{
    Stop,
    feed::{self, Event, FeedArgs},
};
use serde_json::json;

use crate::{for_each_version, versions::Qemu, vm::Machine};

#[derive(Parser)]
#[command(no_binary_name = true)]
struct Line {
    #[command(flatten)]
    args: FeedArgs,
}

fn a_secondary_takes_a_recording_and_the_guest_runs_on(qemu: Qemu) {
    if !qemu.can_run() {
        return;
    }
    let (_, memory, checkpoints) = qemu.recording;
    let machine = Machine::bare(qemu, memory);
    let socket = machine.path("migration");
    let uri = format!("unix:{}", socket.display());
    let mut secondary = machine.start(&["-incoming", "defer"]);
    secondary.capabilities(&[]);
    secondary.qmp.run("migrate-incoming", json!({"uri": uri}));

    let line = Line::try_parse_from(["--connect", &uri, &qemu.recording_path()]).unwrap();
    let mut events = vec![];
    let stop = Stop::new().unwrap();
    let fed = feed::run(&line.args, &stop, &mut |event| events.push(event)).unwrap();
    assert_eq!(fed, checkpoints);
    assert!(matches!(events[0], Event::Ready { .. }));
    assert_eq!(events.len() as u64, 1 + checkpoints);

    // It sees the link close and waits for somebody to decide.
    secondary.qmp.wait("COLO_EXIT");
    secondary.qmp.run("x-colo-lost-heartbeat", json!({}));
    let start = secondary.qmp.words(0x1000, 1)[0];
    assert!(start > 0);
    let patience = std::time::Instant::now();
    while secondary.qmp.words(0x1000, 1)[0] <= start + 10 {
        assert!(patience.elapsed().as_secs() < 60, "the guest stands still");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    secondary.quit();
}

for_each_version!(a_secondary_takes_a_recording_and_the_guest_runs_on,);
