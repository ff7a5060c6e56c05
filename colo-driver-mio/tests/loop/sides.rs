//! The loop's other sides: the guest, the arbiter, the record, heartbeat paths, operators. None of
//! them is waited for.

use std::{sync::mpsc::RecvTimeoutError, time::Duration};

use bytes::Bytes;
use colo_driver_mio::{
    arbiter::file::FileArbiter, clock, handle::What, heartbeat::PathConfig, record::RecordStore,
};
use colo_proto::{
    event::Event,
    id::{Epoch, Generation, PageRuns, Role},
    machine::{GuestDone, GuestOp, GuestOpKind, Output},
    member::{
        Ballot, DATAGRAM_SIZE, Mode, NodeId, PathId, Permit, PersistId, Record, RequestId, Verdict,
    },
    status::Mode as PairMode,
};

use crate::script::{Host, PAGES, PATIENCE, Seen, config, report};

#[test]
fn a_guest_operation_that_takes_its_time_keeps_nobody_waiting() {
    let host = Host::start(Role::Primary, config(1));
    host.guest.adjust(|view| view.by_hand = true);
    host.tell(|plan| plan.outputs.push_back(Output::Guest(GuestOp::Pause)));
    let begun = |op| move |view: &colo_driver_mio::guest::fake::View| view.ops.contains(&op);
    assert!(host.guest.wait(PATIENCE, begun(GuestOpKind::Pause)));
    // It is not done, and the loop still answers.
    host.control.snapshot().unwrap();
    let paused = Seen::Guest(GuestDone::Paused);
    assert!(!host.script.plan().seen.contains(&paused));
    assert!(host.guest.finish());
    host.script.wait_for(&paused);
}

#[test]
fn dirty_words_come_before_the_end_of_the_capture_and_later_frames_carry_its_stamp() {
    let host = Host::start(Role::Primary, config(1));
    assert!(host.guest.emit(Bytes::from_static(b"before")));
    host.tell(|plan| {
        plan.outputs.push_back(Output::Guest(GuestOp::Capture {
            epoch: Epoch(4),
            also: PageRuns::new(),
            resume: true,
        }));
    });
    host.script.wait("the capture", |plan| {
        matches!(plan.seen.last(), Some(Seen::Guest(GuestDone::Captured(_))))
    });
    assert!(host.guest.emit(Bytes::from_static(b"after")));
    let after = Seen::FromGuest(Epoch(4), b"after".to_vec());
    host.script.wait_for(&after);
    let plan = host.script.plan();
    let order: Vec<_> = plan
        .seen
        .iter()
        .filter(|seen| !matches!(seen, Seen::Command | Seen::Guest(_)))
        .collect();
    assert_eq!(
        order,
        [
            &Seen::FromGuest(Epoch(0), b"before".to_vec()),
            &Seen::Dirty(PAGES as u64),
            &after
        ]
    );
}

#[test]
fn a_frame_whose_permit_has_ended_does_not_leave() {
    let host = Host::start(Role::Primary, config(1));
    let frame = |text| Bytes::from_static(text);
    let now = clock::now();
    let permit = |until| Permit {
        generation: Generation(1),
        until,
    };
    host.tell(|plan| {
        plan.outputs.extend([
            Output::ToWorld {
                frame: frame(b"late"),
                permit: permit(now),
            },
            Output::ToWorld {
                frame: frame(b"in time"),
                permit: permit(now + Duration::from_secs(60)),
            },
        ]);
    });
    assert!(host.guest.wait(PATIENCE, |view| view.muted == 1));
    host.guest
        .view(|view| assert_eq!(view.world, [frame(b"in time")]));
}

#[test]
fn the_file_arbiter_and_the_record_answer_through_the_loop() {
    let dir = tempfile::tempdir().unwrap();
    let (record, found) = RecordStore::open(&dir.path().join("state")).unwrap();
    assert_eq!(found, None);
    let arbiter = FileArbiter::new(dir.path().join("register"), PATIENCE);
    let host = Host::start_on(Role::Primary, config(1), Box::new(arbiter), record, |_| {});
    let ballot = Ballot {
        request: RequestId(77),
        caller: NodeId(1),
        expect: Generation(0),
        mode: Mode::Solo,
        owner: NodeId(1),
        partner: NodeId(0),
        force: false,
    };
    let mine = Record {
        generation: Generation(1),
        ..Record::default()
    };
    host.tell(|plan| {
        plan.outputs.extend([
            Output::Persist(PersistId(1), Record::default()),
            Output::Persist(PersistId(2), mine),
            Output::AskArbiter(ballot),
            Output::ReadArbiter(RequestId(78)),
            Output::Fence(Duration::ZERO),
        ]);
    });
    let register = ballot.outcome();
    for seen in [
        Seen::Persisted(2),
        Seen::Arbiter(RequestId(77), Verdict::Granted(register)),
        Seen::Arbiter(RequestId(78), Verdict::Read(register)),
        Seen::Fenced(false),
    ] {
        host.script.wait_for(&seen);
    }
    host.stop().unwrap();
    let (_store, found) = RecordStore::open(&dir.path().join("state")).unwrap();
    assert_eq!(found, Some(mine), "writes take effect in order");
}

#[test]
fn heartbeats_travel_on_every_path_whatever_its_kind() {
    let dir = tempfile::tempdir().unwrap();
    let unix = |name: &str| format!("unix:{}", dir.path().join(name).display());
    let udp = || {
        let free = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap().to_string()
    };
    let paths = [(unix("a"), unix("b")), (udp(), udp())];
    let host = |boot, there: bool| {
        let mut config = config(boot);
        config.paths = paths
            .iter()
            .map(|(a, b)| if there { (b, a) } else { (a, b) })
            .map(|(local, peer)| PathConfig {
                local: local.parse().unwrap(),
                peer: peer.parse().unwrap(),
            })
            .collect();
        Host::start(Role::Primary, config)
    };
    let a = host(1, false);
    // Nobody is there yet: nothing happens, and nothing breaks.
    let beat = |n| [n; DATAGRAM_SIZE];
    a.tell(|plan| plan.outputs.push_back(Output::Datagram(PathId(0), beat(9))));
    let b = host(2, true);
    for (from, to, n) in [(&a, &b, 1), (&b, &a, 3)] {
        from.tell(|plan| {
            plan.outputs.extend([
                Output::Datagram(PathId(0), beat(n)),
                Output::Datagram(PathId(1), beat(n + 1)),
            ]);
        });
        to.script.wait_for(&Seen::Datagram(beat(n).to_vec()));
        to.script.wait_for(&Seen::Datagram(beat(n + 1).to_vec()));
    }
    drop((a, b));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn events_reach_every_subscriber_and_a_slow_one_loses_the_stream_only_for_itself() {
    let host = Host::start(Role::Primary, config(1));
    let (slow, fast) = (
        host.control.subscribe().unwrap(),
        host.control.subscribe().unwrap(),
    );
    // Whatever is asked later finds them subscribed.
    host.control.snapshot().unwrap();
    let told = Event::ModeChanged(PairMode::Lockstep);
    let many = 5000;
    for _ in 0..many / 100 {
        host.tell(|plan| {
            plan.outputs
                .extend((0..100).map(|_| Output::Event(told.clone())));
        });
        for _ in 0..100 {
            let what = report(&fast, |_| true);
            assert_eq!(what, What::Machine(told.clone()));
        }
    }
    // The slow one still reads what was kept for it, then finds the end.
    let kept = slow.iter().count();
    assert!(kept < many, "{kept}");
    assert_eq!(
        fast.recv_timeout(Duration::ZERO),
        Err(RecvTimeoutError::Timeout),
        "the other goes on"
    );
}
