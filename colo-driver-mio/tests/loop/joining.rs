//! Who may join, who is sent away with which reason, and that the loop survives strangers.

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use colo_driver_mio::{
    Driver, DriverError, Endpoint,
    arbiter::none::NoArbiter,
    guest::fake::FakeGuest,
    handle::{AskError, What},
    record::RecordStore,
};
use colo_proto::{
    command::Command,
    id::{Channel, Role},
    machine::Output,
    member::{MacKey, VmId},
};

use crate::script::{
    Host, PATIENCE, Script, Seen, config, dialling, listening, message, pair, report, small,
};

const CONTROL: Channel = Channel::Control;

fn connect(to: &Host) -> TcpStream {
    let Some(Endpoint::Tcp(at)) = to.at.clone() else {
        panic!("listens on TCP");
    };
    TcpStream::connect(at).unwrap()
}

#[test]
fn strangers_are_sent_away_and_the_peer_still_joins() {
    let primary = Host::start(Role::Primary, listening(1));
    let reports = primary.control.subscribe().unwrap();
    primary.control.snapshot().unwrap();
    // One says nothing and stays, one leaves in the middle, one talks garbage.
    let _silent = connect(&primary);
    connect(&primary).write_all(b"COLJ").unwrap();
    let mut loud = connect(&primary);
    loud.write_all(&[b'x'; 4096]).unwrap();
    let why = report(&reports, |what| matches!(what, What::CallerRefused(_)));
    let again = report(&reports, |what| matches!(what, What::CallerRefused(_)));
    let both = format!("{why:?} {again:?}");
    assert!(both.contains("caller 127.0.0.1: "), "{both}");
    assert!(both.contains("not colo"), "{both}");
    assert!(both.contains("ended in the handshake"), "{both}");
    // It saw the challenge and then the end, nothing else.
    let mut got = Vec::new();
    let _reset_or_end = loud.read_to_end(&mut got);
    assert!(got.len() <= 32);

    let secondary = Host::start_with(Role::Secondary, dialling(2, &primary), |plan| {
        plan.outputs.push_back(Output::Dial(CONTROL));
    });
    secondary.script.wait_for(&Seen::Up(CONTROL));
    primary.script.wait_for(&Seen::Up(CONTROL));
}

#[test]
fn each_misfit_is_told_its_reason() {
    let primary = Host::start(Role::Primary, listening(1));
    let idle = Host::start(Role::Secondary, listening(9));
    let first = Host::start_with(Role::Secondary, dialling(2, &primary), |plan| {
        plan.outputs.push_back(Output::Dial(CONTROL));
    });
    first.script.wait_for(&Seen::Up(CONTROL));

    let mut other_key = dialling(3, &primary);
    other_key.identity.key = MacKey([4; 16]);
    let mut other_vm = dialling(4, &primary);
    other_vm.identity.vm = VmId([8; 16]);
    let second = dialling(5, &primary);
    let to_a_secondary = dialling(6, &idle);
    let more_lanes = dialling(2, &primary);
    let unknown = dialling(2, &primary);
    for (config, channel, reason) in [
        (other_key, CONTROL, "do not have the same key"),
        (other_vm, CONTROL, "protects another VM"),
        (second, CONTROL, "already has a secondary"),
        (
            to_a_secondary,
            CONTROL,
            "the host that was called is not the primary",
        ),
        (more_lanes, Channel::Ram(7), "no such channel"),
        (unknown, Channel::Disk, "no such channel"),
    ] {
        let host = Host::start(Role::Secondary, config);
        let reports = host.control.subscribe().unwrap();
        host.control.snapshot().unwrap();
        host.tell(|plan| plan.outputs.push_back(Output::Dial(channel)));
        let what = report(&reports, |what| matches!(what, What::NotConnected(..)));
        assert!(format!("{what:?}").contains(reason), "{what:?}");
        host.script.wait_for(&Seen::Down(channel));
    }
    assert!(!first.script.plan().seen.contains(&Seen::Down(CONTROL)));
}

#[test]
fn a_restarted_peer_joins_again_and_so_does_one_that_calls_twice() {
    let (primary, secondary) = pair(listening(1), |p| dialling(2, p), &[CONTROL]);
    let config = dialling(3, &primary);
    drop(secondary);
    primary.script.wait_for(&Seen::Down(CONTROL));
    let count = |what: Seen| {
        move |plan: &crate::script::Plan| plan.seen.iter().filter(|s| **s == what).count()
    };
    let _restarted = Host::start_with(Role::Secondary, config.clone(), |plan| {
        plan.outputs.push_back(Output::Dial(CONTROL));
    });
    primary
        .script
        .wait("a second Up", |plan| count(Seen::Up(CONTROL))(plan) == 2);
    // The same process again: its old connection must be dead.
    let twin = Host::start_with(Role::Secondary, config, |plan| {
        plan.outputs.push_back(Output::Dial(CONTROL));
    });
    primary.script.wait("a third Up", |plan| {
        count(Seen::Up(CONTROL))(plan) == 3 && count(Seen::Down(CONTROL))(plan) == 2
    });
    drop(twin);
}

#[test]
fn a_peer_that_is_not_there_is_dialled_until_it_is() {
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let mut dialler = config(2);
    dialler.peer = Some(Endpoint::Tcp(port));
    let secondary = Host::start_with(Role::Secondary, dialler, |plan| {
        plan.redial = true;
        plan.outputs.push_back(Output::Dial(CONTROL));
    });
    secondary.script.wait("some attempts", |plan| {
        plan.seen
            .iter()
            .filter(|seen| **seen == Seen::Down(CONTROL))
            .count()
            >= 3
    });
    let mut listener = config(1);
    listener.listen = Some(Endpoint::Tcp(port));
    let primary = Host::start(Role::Primary, listener);
    secondary.script.wait_for(&Seen::Up(CONTROL));
    primary.script.wait_for(&Seen::Up(CONTROL));
}

#[test]
fn an_address_in_use_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let at = Endpoint::Tcp(taken.local_addr().unwrap());
    let mut config = config(1);
    config.listen = Some(at.clone());
    let made = Driver::new(
        config,
        Script::new(Role::Primary),
        FakeGuest::new(1).0,
        Box::new(NoArbiter::new()),
        RecordStore::in_memory(),
    );
    let error = made.unwrap_err();
    assert!(matches!(&error, DriverError::InUse { at: named, .. } if *named == at));
    assert!(error.to_string().contains("in use by another process"));
}

#[test]
fn a_killed_process_leaves_no_socket_that_is_in_the_way_and_a_live_one_does() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "as after a kill");
    let at: Endpoint = format!("unix:{}", path.display()).parse().unwrap();
    let mut config = config(1);
    config.listen = Some(at);
    let host = Host::start(Role::Primary, config.clone());
    let second = Driver::new(
        config,
        Script::new(Role::Primary),
        FakeGuest::new(1).0,
        Box::new(NoArbiter::new()),
        RecordStore::in_memory(),
    );
    assert!(matches!(second.unwrap_err(), DriverError::InUse { .. }));
    host.stop().unwrap();
}

#[test]
fn a_broken_contract_ends_the_loop_with_its_name() {
    let host = Host::start(Role::Primary, listening(1));
    let control = host.control.clone();
    host.script.plan().misuse = true;
    let asked = control.command(Command::CheckpointNow, PATIENCE);
    assert_eq!(asked, Err(AskError::Ended), "whoever waits is told");
    let error = host.ended().unwrap_err();
    assert!(error.to_string().contains("a bug in the driver"), "{error}");
    assert!(control.snapshot().is_err());
}

#[test]
fn what_is_in_flight_is_sent_before_the_loop_ends() {
    let (primary, secondary) = pair(listening(1), |p| dialling(2, p), &[CONTROL]);
    secondary.tell(|plan| {
        plan.demands.insert(CONTROL, [small(3), small(1)].into());
    });
    primary.tell(|plan| {
        plan.transmits.insert(CONTROL, [message(b"bye")].into());
    });
    // Bytes that the primary never reads must not turn its end into a reset.
    secondary.tell(|plan| {
        plan.transmits.insert(CONTROL, [message(&[0; 4096])].into());
    });
    primary.stop().unwrap();
    secondary
        .script
        .wait_for(&Seen::Bytes(CONTROL, b"bye".to_vec()));
    secondary.script.wait_for(&Seen::Down(CONTROL));
}
