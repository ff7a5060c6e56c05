//! A primary whose link is cut behind any byte leaves a usable standby: ready for another primary
//! while nothing was whole, resumable afterwards.

use std::net::TcpListener;

use colod::qemu::standby::{Event, Outcome};
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};
use serde_json::json;

use crate::{
    for_each_version,
    proxy::Proxy,
    side::Side,
    standby::goes_on,
    versions::Qemu,
    vm::{Machine, Vm, arguments},
};

/// Cuts in a run; `COLO_CUTS=500 COLO_SEED=2` for more and others.
fn cuts() -> usize {
    let wanted = std::env::var("COLO_CUTS").ok();
    wanted.and_then(|n| n.parse().ok()).unwrap_or(50)
}

fn a_cut_behind_any_byte_leaves_a_usable_standby(qemu: Qemu) {
    if !qemu.can_run() {
        return;
    }
    let machine = Machine::dirty(qemu, 64);
    let snapshot = booted(&machine);
    let start = || {
        let incoming = format!("exec:cat {snapshot}");
        let mut vm = machine.start(&["-incoming", &incoming]);
        vm.wait_until_running();
        vm
    };
    // The first is not cut before its tenth checkpoint: it tells how long the parts are.
    let (migration, checkpoint) = measure(&machine, start());
    let seed: u64 = std::env::var("COLO_SEED").map_or(1, |s| s.parse().unwrap());
    let mut random = SmallRng::seed_from_u64(seed);
    let (mut none, mut resumed) = (0, 0);
    while none + resumed < cuts() {
        let out = machine.path(&format!("cut-{none}-{resumed}.stream"));
        let (listener, command) = machine.resume_command("-S");
        let side = Side::start(arguments([
            "--listen",
            "127.0.0.1:0",
            "--out",
            out.to_str().unwrap(),
            "--resume-with",
            &command,
        ]));
        // Again and again into the same standby until one was cut behind the migration.
        loop {
            let most = if random.random_ratio(1, 3) {
                random.random_range(0..migration)
            } else {
                migration + random.random_range(0..6 * checkpoint)
            };
            eprintln!("seed {seed}: cut behind byte {most}");
            let mut primary = start();
            let proxy = Proxy::start(&side.uri, most);
            primary.protect(&proxy.uri, 10);
            let passed = proxy.join();
            primary.kill();
            assert_eq!(passed, most, "the primary left first");
            assert_eq!(side.next(), Event::Connected);
            match side.after_checkpoints() {
                (Event::Lost { epoch: None, .. }, None) => none += 1,
                (
                    Event::Lost {
                        epoch: Some(epoch),
                        resumes: true,
                        ..
                    },
                    newest,
                ) => {
                    assert_eq!(Some(epoch), newest);
                    break;
                }
                other => panic!("cut behind byte {most}: {other:?}"),
            }
        }
        goes_on(Vm::attach(&listener), &out);
        assert!(matches!(side.join(), Outcome::Resumed(_, Some(s)) if s.success()));
        resumed += 1;
    }
}

/// Boots the guest once and saves it: starting from that takes no firmware.
fn booted(machine: &Machine) -> String {
    let snapshot = machine.path("booted.stream");
    let snapshot = snapshot.to_str().unwrap().to_owned();
    let mut vm = machine.start(&[]);
    vm.wait_until(|c| c.is_ready() && c.progress > 10);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    vm.qmp.run("migrate", json!({"uri": uri}));
    let (mut stream, _) = listener.accept().unwrap();
    let mut file = std::fs::File::create(&snapshot).unwrap();
    std::io::copy(&mut stream, &mut file).unwrap();
    vm.quit();
    snapshot
}

/// Bytes of the migration and of one checkpoint.
fn measure(machine: &Machine, mut primary: Vm) -> (u64, u64) {
    let out = machine.path("measured.stream");
    let side = Side::start(arguments([
        "--listen",
        "127.0.0.1:0",
        "--out",
        out.to_str().unwrap(),
    ]));
    primary.protect(&side.uri, 10);
    let mut migration = 0;
    loop {
        match side.next() {
            Event::Whole {
                epoch: 0, offset, ..
            } => migration = offset,
            Event::Whole {
                epoch: 10, offset, ..
            } => return (migration, (offset - migration) / 10),
            Event::Whole { .. } | Event::Connected | Event::Protected { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

for_each_version!(a_cut_behind_any_byte_leaves_a_usable_standby,);
