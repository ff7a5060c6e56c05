//! Two real nodes, each on its loop, with fake guests: they find each other, protect, survive the
//! end of one without notice, and protect again.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on fails"
)]

use std::{
    path::Path,
    sync::mpsc::Receiver,
    thread::{self, JoinHandle},
    time::Duration,
};

use bytes::Bytes;
use colo_driver_mio::{
    ControlHandle, Driver, DriverConfig, DriverError,
    arbiter::file::FileArbiter,
    clock,
    guest::fake::{FakeGuest, FakeHandle, SLOT},
    handle::{Report, What},
    heartbeat::PathConfig,
    priority::Priority,
    record::RecordStore,
};
use colo_proto::{
    command::{Answer, Command},
    config::Config,
    event::Event,
    member::{BootId, MacKey, MemberConfig, NodeId, VmId},
    node::{Node, Start},
    wire::join::Identity,
};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);
const PAGES: usize = 512;
const VM: VmId = VmId([9; 16]);
const KEY: MacKey = MacKey([5; 16]);

struct Host {
    guest: FakeHandle,
    control: ControlHandle,
    reports: Receiver<Report>,
    thread: JoinHandle<Result<FakeGuest, DriverError>>,
}

impl Host {
    /// Host 1 or 2 in `dir`; `boot` is new for every start.
    fn start(dir: &Path, host: u64, boot: u64, start: Start) -> Self {
        let at = |host: u64, what: &str| {
            let path = dir.join(format!("{host}-{what}"));
            format!("unix:{}", path.display()).parse().unwrap()
        };
        let peer = 3 - host;
        let boot = BootId(boot);
        let (record, found) = RecordStore::open(&dir.join(format!("state-{host}"))).unwrap();
        let member = MemberConfig::new(VM, NodeId(peer), KEY);
        let protocol = Config::builder(NodeId(host), member, &[(SLOT, PAGES as u64)])
            .lanes(2)
            .longest(Duration::from_millis(20))
            .build()
            .unwrap();
        let node = Node::new(protocol, start, boot, found, boot.0, clock::now());
        let mut config = DriverConfig::new(Identity {
            vm: VM,
            boot,
            key: KEY,
        });
        config.listen = Some(at(host, "pair"));
        config.peer = Some(at(peer, "pair"));
        config.paths = ["beat-a", "beat-b"]
            .map(|path| PathConfig {
                local: at(host, path),
                peer: at(peer, path),
            })
            .into();
        config.priority = Priority::Normal;
        let (guest, handle) = match start {
            Start::Primary => FakeGuest::new(PAGES),
            Start::Secondary => FakeGuest::empty(PAGES),
        };
        let arbiter = FileArbiter::new(dir.join("register"), Duration::from_millis(500));
        let driver = Driver::new(config, node, guest, Box::new(arbiter), record).unwrap();
        let control = driver.control();
        let reports = control.subscribe().unwrap();
        Self {
            guest: handle,
            control,
            reports,
            thread: thread::spawn(move || driver.run()),
        }
    }

    /// Waits for an event.
    fn event(&self, what: &str, is: impl Fn(&Event) -> bool) {
        let until = std::time::Instant::now() + PATIENCE;
        let mut told = Vec::new();
        loop {
            let left = until.saturating_duration_since(std::time::Instant::now());
            let Ok(report) = self.reports.recv_timeout(left) else {
                let status = self.control.snapshot();
                panic!("no {what}; told {told:#?}, now {status:#?}");
            };
            if let What::Machine(event) = &report.what
                && is(event)
            {
                return;
            }
            if !matches!(report.what, What::Machine(Event::Checkpointed { .. })) {
                told.push(report.what);
            }
        }
    }

    fn protected(&self) {
        self.event("Protected", |event| {
            matches!(event, Event::Protected { .. })
        });
    }

    fn checkpoint(&self) {
        let answer = self.control.command(Command::CheckpointNow, PATIENCE);
        assert_eq!(answer, Ok(Answer::Done));
    }

    /// A client asks; yields when the answer has left.
    fn ask(&self, n: usize) {
        self.guest.from_world(frame(n));
        assert!(
            self.guest
                .wait(PATIENCE, |guest| guest.world.contains(&answer(n))),
            "no answer to {n}: {:#?}",
            self.guest.view(|guest| format!("{guest:?}"))
        );
    }

    /// Ends without a word to the machine, as a kill does.
    fn kill(self) {
        self.control.stop();
        self.thread.join().unwrap().unwrap();
    }
}

const CLIENT: [u8; 6] = [2, 0, 0, 0, 0, 1];
const SERVER: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// A frame of a protocol of nobody's (ethertype 0x88b5).
fn ethernet(to: [u8; 6], from: [u8; 6], n: usize) -> Bytes {
    let mut frame = [&to[..], &from, &[0x88, 0xb5], &n.to_be_bytes()].concat();
    frame.resize(60, 0);
    frame.into()
}

fn frame(n: usize) -> Bytes {
    ethernet(SERVER, CLIENT, n)
}

fn answer(n: usize) -> Bytes {
    ethernet(CLIENT, SERVER, n)
}

#[test]
fn a_pair_protects_survives_the_primary_and_protects_again() {
    let dir = tempfile::tempdir().unwrap();
    let secondary = Host::start(dir.path(), 2, 20, Start::Secondary);
    let primary = Host::start(dir.path(), 1, 10, Start::Primary);
    for page in 0..PAGES {
        primary.guest.write(page, 1000 + page as u64);
    }
    primary.protected();
    for n in 1..=10 {
        primary.ask(n);
    }
    primary.checkpoint();
    let ticks = primary.guest.view(|guest| guest.ticks);
    assert_eq!(ticks, 10);
    assert!(secondary.guest.view(|guest| guest.world.is_empty()));
    let before = primary.guest.clone();

    primary.kill();
    secondary.event("Promoted", |event| matches!(event, Event::Promoted { .. }));
    assert!(secondary.guest.wait(PATIENCE, |guest| guest.running));
    assert!(secondary.guest.wait(PATIENCE, |guest| guest.announced > 0));
    assert_eq!(secondary.guest.view(|guest| guest.ticks), ticks);
    assert!(secondary.guest.same_ram(&before), "every page, as it was");
    secondary.ask(11);

    let third = Host::start(dir.path(), 1, 11, Start::Secondary);
    secondary.protected();
    for n in 12..=20 {
        secondary.ask(n);
    }
    let last = secondary.guest.clone();
    secondary.checkpoint();
    secondary.kill();
    third.event("Promoted", |event| matches!(event, Event::Promoted { .. }));
    assert!(third.guest.wait(PATIENCE, |guest| guest.running));
    assert_eq!(third.guest.view(|guest| guest.ticks), 20);
    assert!(third.guest.same_ram(&last));
    third.ask(21);
    third.kill();
}

#[test]
fn a_primary_goes_on_alone_when_its_secondary_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let primary = Host::start(dir.path(), 1, 10, Start::Primary);
    let secondary = Host::start(dir.path(), 2, 20, Start::Secondary);
    primary.protected();
    primary.ask(1);
    secondary.kill();
    primary.event("Unprotected", |event| {
        matches!(event, Event::Unprotected(_))
    });
    primary.ask(2);
    primary.kill();
}
