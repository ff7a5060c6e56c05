//! How long a QEMU primary stands still for a checkpoint: against `colod standby`, against a QEMU
//! secondary of the same version, same guest, same run. Promise: at most half.
//!
//! ```text
//! cargo bench -p colo-tests --bench qemu_pause           COLO_QEMU=11.1 for one version
//! ```
#![expect(
    clippy::unwrap_used,
    reason = "a bench without QEMU has nothing to measure"
)]
#![allow(dead_code, reason = "shares its modules with the qemu tests")]

#[path = "../qemu/qmp.rs"]
mod qmp;
#[path = "../qemu/side.rs"]
mod side;
#[path = "../qemu/versions.rs"]
mod versions;
#[path = "../qemu/vm.rs"]
mod vm;

use serde_json::{Value, json};

use colod::qemu::standby::Event;
use side::Side;
use versions::Qemu;
use vm::{Machine, Vm, arguments};

const CHECKPOINTS: usize = 150;
/// The first checkpoints copy all memory and settle: they are another number.
const SETTLE: usize = 10;
const DELAY_MS: u32 = 20;

fn main() {
    // Cargo runs benches as tests too, to see that they start.
    if std::env::args().any(|a| a == "--test") || !std::path::Path::new("/dev/kvm").exists() {
        println!("SKIPPED: a measurement, and it needs /dev/kvm");
        return;
    }
    println!("pause of a QEMU primary, stop to resume, in ms; {CHECKPOINTS} checkpoints each");
    println!(
        "{:<28} {:>8} {:>8} {:>8} {:>8}",
        "", "first", "median", "p95", "max"
    );
    let wanted = std::env::var("COLO_QEMU").unwrap_or_default();
    for (qemu, unix) in versions::ALL
        .into_iter()
        .flat_map(|q| [(q, false), (q, true)])
    {
        if qemu.binary().is_none() || !(wanted.is_empty() || wanted == qemu.name) {
            println!("SKIPPED: QEMU {}", qemu.name);
            continue;
        }
        let what = if unix { "unix" } else { "tcp" };
        let what = format!("{} {what}", qemu.name);
        let ours = against_standby(qemu, unix);
        let theirs = against_qemu(qemu, unix);
        let (ours, theirs) = (
            row(&format!("{what}, colod standby"), ours),
            row(&format!("{what}, QEMU secondary"), theirs),
        );
        println!("{what}: ratio of the medians {:.3}", ours / theirs);
    }
}

fn row(name: &str, mut pauses: Vec<f64>) -> f64 {
    let first = pauses[0];
    pauses.drain(..SETTLE);
    pauses.sort_by(f64::total_cmp);
    let at = |q: f64| pauses[((pauses.len() - 1) as f64 * q) as usize];
    println!(
        "{name:<28} {first:>8.2} {:>8.2} {:>8.2} {:>8.2}",
        at(0.5),
        at(0.95),
        at(1.0)
    );
    at(0.5)
}

fn against_standby(qemu: Qemu, unix: bool) -> Vec<f64> {
    let machine = Machine::dirty(qemu, 128);
    let socket = format!("unix:{}", machine.path("migration").display());
    let listen = if unix { &socket } else { "127.0.0.1:0" };
    let out = machine.path("vm.stream");
    let side = Side::start(arguments([
        "--listen",
        listen,
        "--out",
        out.to_str().unwrap(),
    ]));
    let pauses = measure(&machine, &side.uri);
    let (mut came, mut answered) = (vec![], vec![]);
    loop {
        match side.next() {
            Event::Whole {
                epoch,
                came_us,
                answered_us,
                ..
            } if epoch as usize > SETTLE => {
                came.push(came_us);
                answered.push(answered_us);
            }
            Event::Whole { .. } | Event::Connected | Event::Protected { .. } => {}
            _ => break,
        }
    }
    spread("QEMU's own sending, VMSTATE_SEND to the last byte", came);
    spread("last byte to LOADED sent", answered);
    pauses
}

fn spread(what: &str, mut micros: Vec<u64>) {
    micros.sort_unstable();
    let (median, most) = (micros[micros.len() / 2], micros[micros.len() - 1]);
    println!("  {what}: median {median} \u{b5}s, max {most} \u{b5}s");
}

fn against_qemu(qemu: Qemu, unix: bool) -> Vec<f64> {
    let machine = Machine::dirty(qemu, 128);
    let uri = if unix {
        format!("unix:{}", machine.path("migration").display())
    } else {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        format!("tcp:{}", port.local_addr().unwrap())
    };
    let mut secondary = machine.start(&["-incoming", "defer"]);
    secondary.capabilities(&[]);
    secondary.qmp.run("migrate-incoming", json!({"uri": uri}));
    measure(&machine, &uri)
}

/// Protects a fresh guest and times its stops.
fn measure(machine: &Machine, uri: &str) -> Vec<f64> {
    let mut primary = machine.start(&[]);
    primary.wait_until(|c| c.is_ready() && c.progress > 10);
    primary.protect(uri, DELAY_MS);
    let pauses = pauses(&mut primary);
    primary.kill();
    pauses
}

fn pauses(primary: &mut Vm) -> Vec<f64> {
    let mut pauses = vec![];
    // The migration's own stop comes first. Both its events go, or every stop would be taken
    // together with the resume of the next one.
    primary.qmp.wait("STOP");
    primary.qmp.wait("RESUME");
    while pauses.len() < CHECKPOINTS {
        let stop = seconds(&primary.qmp.wait("STOP"));
        let resume = seconds(&primary.qmp.wait("RESUME"));
        assert!(resume > stop, "a stop with the resume of another");
        pauses.push((resume - stop) * 1e3);
    }
    pauses
}

fn seconds(event: &Value) -> f64 {
    let stamp = &event["timestamp"];
    stamp["seconds"].as_f64().unwrap() + stamp["microseconds"].as_f64().unwrap() * 1e-6
}
