//! The pair on taps, and the client on the kernel's TCP stack: frames may be left unfinished.

use colod::demo::{Client, Host, Stage, Wires, now};

use crate::common::*;

#[test]
fn frames_without_checksums_and_segments_survive_a_takeover() {
    let Some(_alone) = alone() else { return };
    let wires = match Wires::lay() {
        Ok(wires) => wires,
        Err(error) => return skip("netns", &error.to_string()),
    };
    let mut settings = settings();
    settings.taps = Some(wires.taps());
    settings.log = "info,colod=debug".into();
    let mut stage = Stage::at(colod(), settings, wires.sites()).unwrap();
    let (mut primary, secondary) = pair(&mut stage);
    let plan = plan(&mut stage);
    let client = Client::start_in(&wires.namespace(), plan).unwrap();
    answered(&client, 0, &primary);
    let seen = secondary.events().len();
    let killed = now();
    primary.kill().unwrap();
    expect(&secondary, "PROMOTED", seen);
    answered(&client, killed, &secondary);
    served(client);
    for daemon in [&primary, &secondary] {
        let log = daemon.log();
        assert!(log.contains("checksum=true segmentation=true"), "{log}");
    }
    // What a guest can say as often as it likes is not in an ordinary log.
    stage.settings().log = "info".into();
    let seen = secondary.events().len();
    let third = stage.start(Host::A, "secondary").unwrap();
    expect(&secondary, "PROTECTED", seen);
    let log = third.log();
    assert!(!log.contains("checksum="), "{log}");
}
