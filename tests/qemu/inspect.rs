//! `colod inspect` shows a recording, writes it again byte for byte, and locates damage.

use std::{io::Read as _, path::Path};

use clap::Parser;
use colod::qemu::inspect::{self, InspectArgs, Report};

pub(crate) const RECORDING: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/fixtures/qemu72-pc-1vcpu.p2s.xz"
);

#[derive(Parser)]
#[command(no_binary_name = true)]
struct Line {
    #[command(flatten)]
    args: InspectArgs,
}

fn inspect(words: &[&str]) -> Report {
    let args = Line::try_parse_from(words).unwrap().args;
    inspect::inspect(&args).unwrap()
}

pub(crate) fn recording() -> Vec<u8> {
    let mut bytes = vec![];
    let packed = std::fs::read(RECORDING).unwrap();
    xz2::read::XzDecoder::new(&packed[..])
        .read_to_end(&mut bytes)
        .unwrap();
    bytes
}

#[test]
fn the_recording_is_shown_and_written_again_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("copy");
    let report = inspect(&[RECORDING, "--reencode", copy.to_str().unwrap()]);
    assert!(std::fs::read(copy).unwrap() == recording());
    assert!(report.fault.is_none());
    assert_eq!(report.machine.as_deref(), Some("pc-i440fx-7.2"));
    assert_eq!(report.checkpoints.len(), 11);
    assert_eq!(report.initial.devices.len(), 31);

    let mut text = vec![];
    inspect::print(&report, false, &mut text).unwrap();
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("83886080 bytes  pc.ram"), "{text}");
    let mut json = vec![];
    inspect::print(&report, true, &mut json).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json["checkpoints"][10]["devices"][0]["name"], "timer");
}

#[test]
fn damage_is_located_and_what_came_before_it_is_shown() {
    let dir = tempfile::tempdir().unwrap();
    let damaged = dir.path().join("damaged");
    let good = inspect(&[RECORDING]);
    let third = good.checkpoints[2].offset as usize;
    let mut bytes = recording();
    bytes[third + 3] = 9;
    std::fs::write(&damaged, bytes).unwrap();
    let report = inspect(&[damaged.to_str().unwrap()]);
    assert_eq!(report.checkpoints.len(), 2);
    let fault = report.fault.unwrap();
    assert_eq!((fault.offset, fault.field), (third as u64, "message"));
    assert_eq!(fault.expected, "CHECKPOINT_REQUEST");
    assert!(Path::new(&damaged).exists());
}

#[test]
fn a_packed_capture_that_is_cut_is_shown_up_to_the_cut() {
    let dir = tempfile::tempdir().unwrap();
    let cut = dir.path().join("cut.xz");
    let packed = std::fs::read(RECORDING).unwrap();
    std::fs::write(&cut, &packed[..packed.len() / 2]).unwrap();
    let report = inspect(&[cut.to_str().unwrap()]);
    assert_eq!(report.machine.as_deref(), Some("pc-i440fx-7.2"));
    let fault = report.fault.unwrap();
    assert!(fault.offset > 1_000_000, "{}", fault.text);
    assert!(fault.text.contains("the stream is cut"), "{}", fault.text);
}
