//! First synchronisation of two nodes over loopback TCP, beside a plain copy of as much memory.

use std::{
    sync::mpsc::Receiver,
    thread::{self, JoinHandle},
    time::Duration,
};

use colo_driver_mio::{
    ControlHandle, Driver, DriverConfig, DriverError, Endpoint,
    arbiter::file::FileArbiter,
    clock,
    guest::fake::{FakeGuest, SLOT},
    handle::{Report, What},
    heartbeat::PathConfig,
    record::RecordStore,
};
use colo_proto::{
    config::Config,
    event::Event,
    member::{BootId, MacKey, MemberConfig, NodeId, VmId},
    node::{Node, Start},
    time::Instant,
    wire::join::Identity,
};

use crate::plain;

const PAGES: usize = 128 * 1024;
const REPEATS: usize = 5;

pub(crate) fn measure() {
    for lanes in [1, 2] {
        let mut rates: Vec<_> = (0..REPEATS)
            .map(|_| {
                let plain = plain::copy(PAGES * 4096, PAGES * 4096);
                let sync = synchronise(lanes);
                println!("first synchronisation {sync:.2} GB/s, plain TCP copy {plain:.2} GB/s");
                (sync / plain * 100.0).round() as u64
            })
            .collect();
        rates.sort_unstable();
        println!(
            "first synchronisation over {lanes} lane(s), of a plain copy: median {} %, all {rates:?}",
            rates[REPEATS / 2]
        );
    }
}

/// From the first round to the last page sent, in GB/s.
fn synchronise(lanes: u8) -> f64 {
    let dir = tempfile::tempdir().unwrap();
    let make = |host: u64, start, peer: Option<Endpoint>| {
        let beat = |host: u64| {
            let path = dir.path().join(format!("beat-{host}"));
            format!("unix:{}", path.display()).parse().unwrap()
        };
        let key = MacKey([5; 16]);
        let vm = VmId([9; 16]);
        let member = MemberConfig::new(vm, NodeId(3 - host), key).paths(1);
        let protocol = Config::builder(NodeId(host), member, &[(SLOT, PAGES as u64)])
            .lanes(lanes)
            .build()
            .unwrap();
        let boot = BootId(host);
        let node = Node::new(protocol, start, boot, None, host, clock::now());
        let mut config = DriverConfig::new(Identity { vm, boot, key });
        config.listen = Some("127.0.0.1:0".parse().unwrap());
        config.peer = peer;
        config.paths = vec![PathConfig {
            local: beat(host),
            peer: beat(3 - host),
        }];
        let guest = match start {
            Start::Primary => FakeGuest::new(PAGES).0,
            Start::Secondary => FakeGuest::empty(PAGES).0,
        };
        let arbiter = FileArbiter::new(dir.path().join("register"), Duration::from_millis(500));
        let record = RecordStore::in_memory();
        Driver::new(config, node, guest, Box::new(arbiter), record).unwrap()
    };
    let primary = make(1, Start::Primary, None);
    let at = primary.local();
    let reports = primary.control().subscribe().unwrap();
    let primary = run(primary);
    let secondary = run(make(2, Start::Secondary, at));
    let begun = when(&reports, |e| matches!(e, Event::Synchronising { .. }));
    let done = when(&reports, |e| {
        matches!(e, Event::Protected { .. } | Event::Checkpointed { .. })
    });
    for (control, thread) in [primary, secondary] {
        control.stop();
        thread.join().unwrap().unwrap();
    }
    (PAGES * 4096) as f64 / done.since(begun).as_secs_f64() / 1e9
}

type Running = (ControlHandle, JoinHandle<Result<FakeGuest, DriverError>>);

fn run(driver: Driver<Node, FakeGuest>) -> Running {
    (driver.control(), thread::spawn(move || driver.run()))
}

fn when(reports: &Receiver<Report>, is: impl Fn(&Event) -> bool) -> Instant {
    loop {
        let report = reports.recv().unwrap();
        if let What::Machine(event) = &report.what
            && is(event)
        {
            return report.at;
        }
    }
}
