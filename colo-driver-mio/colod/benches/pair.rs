//! What protection costs and how fast a takeover is, on real processes and real KVM over loopback:
//! the numbers that are promised, each beside its promise.
//!
//! `cargo bench -p colod --bench pair [-- --quick]`
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a benchmark that cannot set up has nothing to measure"
)]

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use colod::{
    config::{Mac, ModeName, Span},
    demo::{Client, Daemon, Host, Plan, Settings, Stage, now},
};
use serde_json::Value;

const COLOD: &str = env!("CARGO_BIN_EXE_colod");
const PATIENCE: Duration = Duration::from_secs(60);

fn main() {
    if fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_err()
    {
        println!("SKIPPED: /dev/kvm cannot be used");
        return;
    }
    let quick = std::env::args().any(|arg| arg == "--quick");
    let time = Duration::from_secs(if quick { 2 } else { 10 });
    println!("{:<52} {:>12} {:>14}", "", "measured", "promised");
    unprotected(time);
    idle(time);
    dirty(time);
    hundred_a_second(time);
    lockstep(time);
    takeover(60, if quick { 3 } else { 20 });
    takeover(300, if quick { 2 } else { 10 });
}

fn row(what: &str, measured: String, promised: &str) {
    println!("{what:<52} {measured:>12} {promised:>14}");
}

fn unprotected(time: Duration) {
    let mut stage = Stage::new(Path::new(COLOD), settings()).unwrap();
    let vm = stage.start(Host::A, "run").unwrap();
    let latencies = latencies(&mut stage, &vm, time);
    row("colod run: latency, median", ms(at(&latencies, 50)), "");
    row(
        "colod run: answers a second",
        (latencies.len() as u64 / time.as_secs()).to_string(),
        "",
    );
}

fn idle(time: Duration) {
    let mut stage = Stage::new(Path::new(COLOD), settings()).unwrap();
    let pair = protect(&mut stage);
    thread::sleep(time);
    let pauses = pauses(&pair.0, 1);
    row(
        "idle, 100 ms epochs: pause, median",
        us(at(&pauses, 50)),
        "<= 1,000 us",
    );
    row(
        "idle, 100 ms epochs: pause, 99 of 100",
        us(at(&pauses, 99)),
        "",
    );
}

/// 410 pages every 10 ms over a working set of 64 MiB: 41,000 pages a second.
fn dirty(time: Duration) {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("dirty");
    fs::write(&kernel, colo_guests::DIRTY).unwrap();
    let mut settings = settings();
    settings.vm.kernel = kernel;
    settings.vm.cmdline = "pages=410 period_us=10000 ws=16384 quiet=1".into();
    let mut stage = Stage::new(Path::new(COLOD), settings).unwrap();
    let primary = stage.start(Host::A, "primary").unwrap();
    // It runs and dirties before anybody joins.
    thread::sleep(Duration::from_secs(1));
    let joined = Instant::now();
    let _secondary = stage.start(Host::B, "secondary").unwrap();
    expect(&primary, "PROTECTED", 0);
    let took = joined.elapsed();
    thread::sleep(time);
    let sync = pauses(&primary, 0).first().copied().unwrap_or_default();
    let first = primary
        .events()
        .iter()
        .find(|event| event["event"] == "CHECKPOINTED")
        .and_then(|event| event["data"]["pause_us"].as_u64())
        .unwrap_or(sync);
    let pauses = pauses(&primary, 1);
    row(
        "41,000 pages/s, 100 ms epochs: pause, median",
        us(at(&pauses, 50)),
        "<= 1,000 us",
    );
    row(
        "41,000 pages/s, 100 ms epochs: pause, 99 of 100",
        us(at(&pauses, 99)),
        "<= 3,000 us",
    );
    row(
        "pause at the end of the first synchronisation",
        us(first),
        "<= p99 above",
    );
    let pages = pages_per_checkpoint(&primary);
    row("pages a checkpoint, median", pages.to_string(), "");
    row(
        "start of the secondary to protected",
        ms(took.as_nanos() as u64),
        "",
    );
    synchronisation(&primary);
}

/// The first round's rate against a plain copy over the same loopback.
fn synchronisation(primary: &Daemon) {
    let events = primary.events();
    let round: Vec<&Value> = events
        .iter()
        .filter(|event| event["event"] == "SYNCHRONISING" && event["data"]["round"] == 0)
        .collect();
    let (Some(begin), Some(end)) = (round.first(), round.last()) else {
        return;
    };
    let nanos = end["at"].as_u64().unwrap() - begin["at"].as_u64().unwrap();
    let bytes = begin["data"]["pages"].as_u64().unwrap() * 4096;
    let ours = bytes as f64 / nanos.max(1) as f64 * 1e3;
    let plain = plain_copy(bytes);
    row("first synchronisation", format!("{ours:.0} MB/s"), "");
    row("plain TCP copy of as much", format!("{plain:.0} MB/s"), "");
    row(
        "first synchronisation against plain copy",
        format!("{:.0} %", ours / plain * 100.0),
        ">= 70 %",
    );
}

/// As much memory, from one process's pages into another's fresh ones, over one connection.
fn plain_copy(bytes: u64) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let size = usize::try_from(bytes).unwrap();
    let from = vec![7; size];
    let sender = thread::spawn(move || {
        let mut stream = TcpStream::connect(to).unwrap();
        stream.write_all(&from).unwrap();
    });
    let (mut stream, _) = listener.accept().unwrap();
    let mut into = vec![0; size];
    let start = Instant::now();
    stream.read_exact(&mut into).unwrap();
    let took = start.elapsed();
    sender.join().unwrap();
    bytes as f64 / took.as_secs_f64() / 1e6
}

fn hundred_a_second(time: Duration) {
    let mut settings = settings();
    settings.protection.longest = Span::from_millis(10);
    settings.protection.shortest = Span::from_millis(10);
    let mut stage = Stage::new(Path::new(COLOD), settings).unwrap();
    let (primary, _secondary) = protect(&mut stage);
    let begin = primary.events().len();
    let latencies = latencies(&mut stage, &primary, time);
    let taken = primary
        .events()
        .iter()
        .skip(begin)
        .filter(|event| event["event"] == "CHECKPOINTED")
        .count();
    row(
        "10 ms epochs: checkpoints a second",
        (taken as u64 / time.as_secs()).to_string(),
        "100",
    );
    row(
        "10 ms epochs: latency, median",
        ms(at(&latencies, 50)),
        "<= 15 ms",
    );
    row(
        "10 ms epochs: latency, 99 of 100",
        ms(at(&latencies, 99)),
        "",
    );
    let pauses = pauses(&primary, begin);
    row("10 ms epochs: pause, median", us(at(&pauses, 50)), "");
}

fn lockstep(time: Duration) {
    let mut settings = settings();
    settings.protection.mode = ModeName::Lockstep;
    settings.protection.longest = Span::from_millis(1000);
    let mut stage = Stage::new(Path::new(COLOD), settings).unwrap();
    let (primary, _secondary) = protect(&mut stage);
    let latencies = latencies(&mut stage, &primary, time);
    row("lockstep: latency, median", ms(at(&latencies, 50)), "");
    row("lockstep: latency, 99 of 100", ms(at(&latencies, 99)), "");
}

fn takeover(detection: u64, kills: usize) {
    let mut settings = settings();
    settings.member.detection = Span::from_millis(detection);
    settings.protection.longest = Span::from_millis(20);
    let mut stage = Stage::new(Path::new(COLOD), settings).unwrap();
    let (mut primary, mut secondary) = protect(&mut stage);
    let client = Client::start(&stage.switch_path(), plan(&mut stage)).unwrap();
    client.answer_after(0, PATIENCE).expect("an answer");
    let (mut spoke, mut answered) = (Vec::new(), Vec::new());
    for kill in 0..kills {
        thread::sleep(Duration::from_millis(200 + 37 * kill as u64 % 100));
        let seen = secondary.events().len();
        let killed = now();
        primary.kill().unwrap();
        expect(&secondary, "PROMOTED", seen);
        let answer = client.answer_after(killed, PATIENCE).expect("an answer");
        let (mac, pid) = (stage.settings().mac, secondary.pid());
        let sightings = stage.switch().sightings();
        let first = sightings
            .iter()
            .find(|s| s.mac == mac && s.pid == pid && s.at > killed)
            .expect("a frame of the survivor");
        spoke.push(first.at - killed);
        answered.push(answer.first_byte - killed);
        primary = secondary;
        let seen = primary.events().len();
        secondary = stage.start(primary.host().other(), "secondary").unwrap();
        expect(&primary, "PROTECTED", seen);
    }
    spoke.sort_unstable();
    answered.sort_unstable();
    let what = format!("detection {detection} ms: kill -9 to first byte");
    row(
        &format!("{what}, median"),
        ms(at(&spoke, 50)),
        &format!("<= {} ms", detection + 20),
    );
    row(
        &format!("{what}, worst of {kills}"),
        ms(at(&spoke, 100)),
        &format!("<= {} ms", detection + 20),
    );
    row(
        &format!("detection {detection} ms: kill -9 to first answer, median"),
        ms(at(&answered, 50)),
        "",
    );
    let report = client.finish(PATIENCE);
    assert_eq!(report.fault, None);
}

fn settings() -> Settings {
    let mut settings = Settings::demo();
    settings.log = "warn".into();
    settings
}

fn plan(stage: &mut Stage) -> Plan {
    Plan {
        mac: Mac([0x02, 0xc0, 0x10, 0, 0, 2]),
        address: [10, 0, 2, 2].into(),
        guest: stage.settings().guest,
        port: 80,
        pause: Duration::ZERO,
        counter_only: true,
    }
}

fn protect(stage: &mut Stage) -> (Daemon, Daemon) {
    let primary = stage.start(Host::A, "primary").unwrap();
    let secondary = stage.start(Host::B, "secondary").unwrap();
    expect(&primary, "PROTECTED", 0);
    (primary, secondary)
}

fn expect(daemon: &Daemon, event: &str, skip: usize) {
    let found = daemon.wait_for(event, skip, PATIENCE);
    assert!(found.is_some(), "no {event}:\n{}", daemon.log());
}

/// Sorted latencies in nanoseconds of a client that asks one thing after the other.
fn latencies(stage: &mut Stage, server: &Daemon, time: Duration) -> Vec<u64> {
    let client = Client::start(&stage.switch_path(), plan(stage)).unwrap();
    assert!(
        client.answer_after(0, PATIENCE).is_some(),
        "{}",
        server.log()
    );
    thread::sleep(time);
    let report = client.finish(PATIENCE);
    assert_eq!(report.fault, None);
    let mut latencies: Vec<u64> = report
        .answers
        .iter()
        .map(|answer| answer.whole - answer.asked)
        .collect();
    latencies.sort_unstable();
    latencies
}

/// Sorted pauses in microseconds of the checkpoints after the first `skip` events.
fn pauses(primary: &Daemon, skip: usize) -> Vec<u64> {
    checkpoints(primary, skip, "pause_us")
}

fn pages_per_checkpoint(primary: &Daemon) -> u64 {
    at(&checkpoints(primary, 1, "pages"), 50)
}

fn checkpoints(primary: &Daemon, skip: usize, field: &str) -> Vec<u64> {
    let mut values: Vec<u64> = primary
        .events()
        .iter()
        .skip(skip)
        .filter(|event| event["event"] == "CHECKPOINTED" && event["data"]["why"] != "firstsync")
        .filter_map(|event| event["data"][field].as_u64())
        .collect();
    values.sort_unstable();
    values
}

fn at(sorted: &[u64], percent: usize) -> u64 {
    let at = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(at).copied().unwrap_or_default()
}

fn ms(nanos: u64) -> String {
    format!("{:.1} ms", nanos as f64 / 1e6)
}

fn us(micros: u64) -> String {
    format!("{micros} us")
}
