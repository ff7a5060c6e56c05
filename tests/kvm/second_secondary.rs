//! There is one secondary: another process that wants to be it is refused, and the pair goes on.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::{TcpListener, UdpSocket},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::Instant,
};

use colod::demo::{Host, now};

use crate::common::*;

#[test]
fn a_second_daemon_on_the_same_host_is_refused_in_one_line() {
    let Some(_alone) = alone() else { return };
    let mut stage = stage();
    let (primary, secondary) = pair(&mut stage);
    let client = client(&mut stage);
    answered(&client, 0, &primary);
    let mut second = stage.start(Host::B, "secondary").unwrap();
    let status = second.wait_end(PATIENCE).unwrap();
    assert_eq!(status.code(), Some(1));
    let log = second.log();
    assert!(log.contains("another colod runs"), "{log}");
    assert!(client.answer_after(now(), PATIENCE).is_some());
    assert_eq!(
        primary.status().unwrap()["protected"],
        true,
        "{}",
        primary.log()
    );
    assert!(
        secondary.control().exists(),
        "its control socket is its own"
    );
    served(client);
}

#[test]
fn a_second_host_that_says_it_is_the_same_node_is_refused_and_changes_nothing() {
    let Some(_alone) = alone() else { return };
    let mut stage = stage();
    let (primary, secondary) = pair(&mut stage);
    let client = client(&mut stage);
    answered(&client, 0, &primary);
    // Another machine with a copy of the configuration: its own addresses, its own directory.
    let mut config = fs::read_to_string(stage.directory().join("beta/vm.toml")).unwrap();
    let stream = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut moved = vec![(stage.stream_address(Host::B), stream.local_addr().unwrap())];
    for beats in stage.beat_addresses(Host::B) {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        moved.push((beats, socket.local_addr().unwrap()));
    }
    for (from, to) in moved {
        config = config.replace(&from.to_string(), &to.to_string());
    }
    drop(stream);
    let config = config.replace("/beta", "/gamma");
    let place = stage.directory().join("gamma");
    fs::create_dir(&place).unwrap();
    fs::write(place.join("vm.toml"), config).unwrap();
    let mut third = Command::new(colod())
        .args(["secondary", "--die-with-parent", "--config"])
        .arg(place.join("vm.toml"))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (tell, told) = mpsc::channel();
    let log = BufReader::new(third.stderr.take().unwrap());
    thread::spawn(move || log.lines().try_for_each(|line| tell.send(line.unwrap())));
    let patience = Instant::now() + PATIENCE;
    let mut said = Vec::new();
    while !said
        .iter()
        .any(|line: &String| line.contains("already has a secondary"))
    {
        let left = patience.saturating_duration_since(Instant::now());
        let line = told.recv_timeout(left);
        said.push(line.unwrap_or_else(|_| panic!("it is not refused: {said:#?}")));
    }
    third.kill().unwrap();
    third.wait().unwrap();
    answered(&client, now(), &primary);
    for daemon in [&primary, &secondary] {
        assert_eq!(daemon.status().unwrap()["protected"], true);
    }
    served(client);
}
