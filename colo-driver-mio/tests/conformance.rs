//! The conformance kit over the fake guest: right as it is, and with each of eleven faults.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use bytes::Bytes;
use colo_driver_mio::{
    guest::fake::{FakeGuest, Fault, HEARD, SLOT, WRITTEN, number},
    testing::{Subject, Verdict, examine},
};
use colo_proto::machine::GuestOpKind;

const PAGES: usize = 64;

/// What the kit says of the fake with this fault.
fn verdicts(fault: Option<Fault>) -> Vec<Verdict> {
    let (guest, handle) = FakeGuest::new(PAGES);
    handle.adjust(|view| view.fault = fault);
    let ends = Arc::new(AtomicBool::new(false));
    let (left, fail, worker) = (handle.clone(), handle.clone(), handle.clone());
    let end = Arc::clone(&ends);
    let works = thread::spawn(move || {
        while !end.load(Ordering::Acquire) {
            for _ in 0..4 {
                worker.work();
            }
            thread::sleep(Duration::from_millis(1));
        }
    });
    let subject = Subject {
        slots: vec![(SLOT, PAGES as u64)],
        written: WRITTEN,
        heard: HEARD,
        said: number,
        call: || Bytes::from_static(&[1; 60]),
        rounds: 12,
        left: Some(Box::new(move || left.view(|view| view.world.len() as u64))),
        fail: Some(Box::new(move || {
            fail.adjust(|view| view.fail = Some(GuestOpKind::Capture));
        })),
    };
    let verdicts = examine(guest, subject);
    ends.store(true, Ordering::Release);
    works.join().unwrap();
    verdicts
}

/// How often a faulty guest is examined before the fault counts as not found.
const TRIES: u32 = 5;

#[test]
fn the_fake_conforms() {
    for verdict in verdicts(None) {
        println!("{verdict}");
        assert!(verdict.outcome.is_ok(), "{verdict}");
    }
}

#[test]
fn every_fault_is_found_by_name() {
    for (fault, name) in Fault::ALL {
        // Some faults are races: the kit has to be looking in the moment they happen.
        let verdicts = (0..TRIES)
            .map(|_| verdicts(Some(fault)))
            .find(|all| all.iter().any(|v| v.name == name && v.outcome.is_err()))
            .unwrap_or_else(|| panic!("{fault:?} is not found as {name:?} in {TRIES} tries"));
        let found = verdicts
            .iter()
            .find(|verdict| verdict.name == name)
            .unwrap();
        println!("{fault:?}: {found}");
        let all: Vec<String> = verdicts.iter().map(ToString::to_string).collect();
        assert!(found.outcome.is_err(), "{fault:?} is not found: {all:#?}");
        let why = found.outcome.as_ref().unwrap_err();
        assert_ne!(why, "not reached", "{fault:?}: {all:#?}");
    }
}
