//! Back-pressure, spurious wake-ups, and heartbeats beside a lane that is full.

use bytes::Bytes;
use colo_driver_mio::{
    DriverConfig, Endpoint, arbiter::none::NoArbiter, clock, guest::fake::run, record::RecordStore,
};
use colo_proto::{
    id::{Channel, PAGE_SIZE, Role},
    machine::{Body, Demand, Output, Sink, Transmit},
    member::{DATAGRAM_SIZE, PathId},
};

use crate::script::{Host, Script, Seen, dialling, listening, message, pair, path_to, small};

const RAM: Channel = Channel::Ram(0);

#[test]
fn what_is_not_demanded_stays_in_the_socket_and_comes_when_it_is() {
    let (primary, secondary) = pair(listening(1), |p| dialling(2, p), &[RAM, Channel::Control]);
    let block = vec![7; 1 << 20];
    let count = 64;
    primary.tell(|plan| {
        plan.transmits
            .insert(RAM, (0..count).map(|_| message(&block)).collect());
    });
    // The lane fills up while the other channel goes on.
    secondary.tell(|plan| {
        plan.demands.insert(Channel::Control, [small(4)].into());
    });
    primary.tell(|plan| {
        plan.transmits
            .insert(Channel::Control, [message(b"ping")].into());
    });
    secondary
        .script
        .wait_for(&Seen::Bytes(Channel::Control, b"ping".to_vec()));
    let total = (count * block.len()) as u64;
    let sent = primary.script.plan().sent.get(&RAM).copied().unwrap_or(0);
    assert!(sent < total, "all {total} bytes fitted into the socket");
    // No byte arrives that could make an edge; the demand alone must be enough.
    secondary.tell(|plan| {
        plan.demands
            .insert(RAM, (0..count).map(|_| small(block.len())).collect());
    });
    primary
        .script
        .wait("all sent", |plan| plan.sent.get(&RAM) == Some(&total));
    secondary.script.wait("all received", |plan| {
        plan.seen
            .iter()
            .filter(|seen| matches!(seen, Seen::Bytes(RAM, bytes) if *bytes == block))
            .count()
            == count
    });
}

#[test]
fn a_wake_up_without_a_cause_changes_nothing() {
    let (primary, _secondary) = pair(listening(1), |p| dialling(2, p), &[RAM]);
    let before = primary.script.plan().inputs;
    let first = primary.control.snapshot().unwrap();
    for _ in 0..100 {
        primary.control.snapshot().unwrap();
    }
    let last = primary.control.snapshot().unwrap();
    assert_eq!(primary.script.plan().inputs, before);
    assert_eq!(last.channels, [RAM]);
    // Looking is what wakes it: one turn a look, and none in between.
    assert!(last.driver.turns <= first.driver.turns + 2 * 101 + 2);
}

#[test]
fn heartbeats_pass_a_lane_that_is_full() {
    let with_path = |mut config: DriverConfig, peer: &Endpoint| {
        config.paths = vec![path_to(peer)];
        config
    };
    // Heartbeats go one way here, so the primary needs no address to send to.
    let nowhere = "127.0.0.1:9".parse().unwrap();
    let primary = Host::start(Role::Primary, with_path(listening(1), &nowhere));
    let dialler = with_path(dialling(2, &primary), &primary.paths[0]);
    let secondary = Host::start_with(Role::Secondary, dialler, |plan| {
        plan.outputs.push_back(Output::Dial(RAM));
        plan.soak = Some(Demand::Read {
            place: Some(Sink::Cache(run(0, 64))),
            then: 8,
        });
    });
    primary.script.wait_for(&Seen::Up(RAM));
    primary.tell(|plan| {
        plan.flood = Some(Transmit {
            head: Bytes::new(),
            body: Body::Live(run(0, 64)),
        });
    });
    let enough = 64 * PAGE_SIZE;
    primary.script.wait("the flood", |plan| {
        plan.sent.get(&RAM).is_some_and(|&sent| sent > enough)
    });
    // Each datagram has to pass the sender's and the receiver's full turns.
    for n in 0..200u8 {
        let mut beat = [0; DATAGRAM_SIZE];
        beat[0] = n;
        secondary.tell(|plan| plan.outputs.push_back(Output::Datagram(PathId(0), beat)));
        primary.script.wait_for(&Seen::Datagram(beat.to_vec()));
    }
    let before = primary.script.plan().sent[&RAM];
    primary.script.wait("the flood to go on", |plan| {
        plan.sent[&RAM] > before + enough
    });
    let loops = primary.control.snapshot().unwrap();
    assert!(loops.driver.exhausted > 0, "the lane never filled its turn");
}

#[test]
fn a_timeout_waits_for_heartbeats_that_came_in_time() {
    let mut config = listening(1);
    config.paths = vec![path_to(&"127.0.0.1:9".parse().unwrap())];
    let beats = 200;
    let script = Script::new(Role::Primary);
    script.plan().due = Some(clock::now());
    let (arbiter, record) = (Box::new(NoArbiter::new()), RecordStore::in_memory());
    let primary = Host::start_after(script, config, arbiter, record, |paths| {
        let Some(Endpoint::Tcp(at)) = &paths[0] else {
            panic!("a UDP path");
        };
        let outside = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        for _ in 0..beats {
            outside.send_to(b"beat", at).unwrap();
        }
    });
    primary.script.wait_for(&Seen::Timeout);
    let plan = primary.script.plan();
    let before = plan.seen.iter().take_while(|seen| **seen != Seen::Timeout);
    assert_eq!(before.count(), beats, "datagrams before the timeout");
}
