//! What each version does with each part of the dialect, on live processes. The table is printed,
//! and is the one in docs/qemu.md; `COLO_BLESS=1` writes it there.

use std::fmt::Write as _;

use colod::qemu::standby::{Event, Outcome};
use serde_json::json;

use crate::{
    side::Side,
    versions::{ALL, Qemu},
    vm::{Machine, Vm, arguments},
};

const DOC: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/qemu.md");
const BEGIN: &str = "<!-- the matrix, written by tests/qemu/matrix.rs -->\n";
const END: &str = "<!-- its end -->\n";

/// How a primary is made.
struct Primary {
    called: &'static str,
    machine: &'static [&'static str],
    capabilities: &'static [&'static str],
}

const PRIMARIES: [Primary; 4] = [
    Primary {
        called: "a primary with its defaults",
        machine: &[],
        capabilities: &[],
    },
    Primary {
        called: "with machine type `pc-i440fx-7.2`",
        machine: &["-machine", "pc-i440fx-7.2"],
        capabilities: &[],
    },
    Primary {
        called: "with `multifd` (two channels)",
        machine: &[],
        capabilities: &["multifd"],
    },
    Primary {
        called: "with `multifd` and machine type `pc-i440fx-7.2`",
        machine: &["-machine", "pc-i440fx-7.2"],
        capabilities: &["multifd"],
    },
];

#[test]
fn each_version_does_what_the_documentation_says() {
    if !ALL.into_iter().all(Qemu::can_run) {
        return;
    }
    let mut table = String::from("| |");
    for qemu in ALL {
        write!(table, " {} |", qemu.name).unwrap();
    }
    table.push_str("\n|---|");
    table.push_str(&"---|".repeat(ALL.len()));
    for primary in &PRIMARIES {
        write!(table, "\n| {} |", primary.called).unwrap();
        for qemu in ALL {
            write!(table, " {} |", protects(qemu, primary)).unwrap();
        }
    }
    table.push('\n');
    println!("{table}");

    let doc = std::fs::read_to_string(DOC).unwrap();
    let (before, rest) = doc.split_once(BEGIN).unwrap();
    let (is, after) = rest.split_once(END).unwrap();
    if std::env::var_os("COLO_BLESS").is_some() {
        std::fs::write(DOC, format!("{before}{BEGIN}{table}{END}{after}")).unwrap();
        return;
    }
    assert_eq!(is, table, "run with COLO_BLESS=1");
}

/// What becomes of one primary: by whose rules it is protected, or why it is not. Either way its
/// guest is not lost.
fn protects(qemu: Qemu, how: &Primary) -> String {
    eprintln!("{} {}", qemu.name, how.called);
    let machine = Machine::dirty(qemu, 64).with(how.machine);
    let (listener, command) = machine.resume_command("-S");
    let stream = machine.path("vm.stream");
    let side = Side::start(arguments([
        "--listen",
        "127.0.0.1:0",
        "--out",
        stream.to_str().unwrap(),
        "--resume-with",
        &command,
    ]));
    let mut primary = machine.start(&[]);
    primary.wait_until(|c| c.is_ready());
    if !how.capabilities.is_empty() {
        primary.capabilities(how.capabilities);
        let two = json!({"multifd-channels": 2});
        primary.qmp.run("migrate-set-parameters", two);
    }
    primary.protect(&side.uri, 10);
    let (mut rules, mut said) = (String::new(), String::new());
    loop {
        match side.next() {
            Event::Protected { qemu, channels: 0 } => rules = qemu,
            Event::Protected { qemu, channels } => {
                rules = format!("{qemu}, {channels} channels");
            }
            Event::Whole { epoch, .. } if epoch >= 20 => break,
            Event::Whole { .. } | Event::Connected => {}
            Event::Lost {
                reason,
                epoch: None,
                ..
            } => {
                said = reason;
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    if said.is_empty() {
        primary.kill();
        crate::standby::goes_on(Vm::attach(&listener), &stream);
        assert!(matches!(side.join(), Outcome::Resumed(_, Some(s)) if s.success()));
        return format!("protected by the rules of {rules}; killed, it goes on");
    }
    assert!(said.contains("switch it off"), "{said}");
    // It never stopped, or is running again.
    let now = primary.counters().progress;
    primary.wait_until(|c| c.progress > now + 10);
    primary.kill();
    side.stop();
    assert_eq!(side.join(), Outcome::Stopped);
    "refused by name, its guest runs on".into()
}
