//! A second VMM, made fault tolerant with the library alone: it survives SIGKILL of either host, and
//! what its author wrote is short.
//!
//! This binary is both: `host DIR NODE primary|secondary` is a host of the pair, anything else runs
//! the tests, which start it that way.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::exit,
    reason = "a test that cannot go on fails"
)]

mod vmm;

use std::{
    env,
    io::{BufRead as _, BufReader},
    os::unix::net::UnixDatagram,
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use colo_driver_mio::{
    handle::What,
    testing::{Subject, examine_vm},
};
use colo_proto::node::Start;

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);
/// What an author of a VMM may have to write.
const LINES: usize = 340;

fn main() {
    let args: Vec<String> = env::args().skip(1).collect();
    if let [mode, dir, node, role] = &args[..]
        && mode == "host"
    {
        let start = match role.as_str() {
            "primary" => Start::Primary,
            _ => Start::Secondary,
        };
        host(Path::new(dir), node.parse().unwrap(), start);
        return;
    }
    its_authors_part_is_short();
    if let Err(error) = kvm_ioctls::Kvm::new() {
        let required = env::var("COLO_REQUIRE").unwrap_or_default();
        assert!(!required.split(',').any(|what| what == "kvm"), "{error}");
        println!("SKIPPED: /dev/kvm cannot be used: {error}");
        return;
    }
    let _alone = lock();
    it_conforms();
    it_survives_its_hosts();
}

/// One host, until it is killed. Says what happens, one event a line.
fn host(dir: &Path, node: u64, start: Start) {
    let (driver, orders, machine) = vmm::host(dir, node, start).unwrap();
    let reports = driver.control().subscribe().unwrap();
    thread::spawn(move || {
        for report in reports {
            if let What::Machine(event) = report.what {
                println!("{event:?}");
            }
        }
    });
    thread::spawn(move || driver.run());
    vmm::serve(machine, orders);
}

/// One pair at a time on this machine, whoever tests.
fn lock() -> std::fs::File {
    let file = std::fs::File::create(env::temp_dir().join("colo-embedded.lock")).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    file
}

struct Process {
    child: Child,
    said: Receiver<String>,
}

impl Process {
    fn start(dir: &Path, node: u64, role: &str) -> Self {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["host", dir.to_str().unwrap(), &node.to_string(), role])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let (saying, said) = channel();
        thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if saying.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, said }
    }

    fn waits_for(&self, what: &str) {
        let until = Instant::now() + PATIENCE;
        let mut told = Vec::new();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.said.recv_timeout(left) {
                Ok(line) if line.starts_with(what) => return,
                Ok(line) => told.push(line),
                Err(error @ (RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected)) => {
                    panic!("no {what}: {error}; told {told:#?}");
                }
            }
        }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// The client at the other end of both cables.
struct Client {
    cable: UnixDatagram,
    /// The newest number that was heard.
    last: u32,
}

impl Client {
    /// Hears `count` numbers, each newer than all before, and answers each.
    fn hears(&mut self, count: u32, dir: &Path) {
        let until = Instant::now() + PATIENCE;
        let mut buffer = [0; 128];
        for _ in 0..count {
            let len = loop {
                match self.cable.recv(&mut buffer) {
                    Ok(len) => break len,
                    Err(_) => assert!(Instant::now() < until, "silence after {}", self.last),
                }
            };
            assert!(len >= 18, "a frame of {len} bytes");
            let number = u32::from_le_bytes(buffer[14..18].try_into().unwrap());
            assert!(
                number > self.last,
                "{number} after {}: the world heard something twice, or what no survivor knows",
                self.last
            );
            self.last = number;
            for node in [1, 2] {
                // One of the two may be dead.
                let _gone = self.cable.send_to(
                    &vmm::frame(&number.to_le_bytes()),
                    dir.join(format!("{node}-cable")),
                );
            }
        }
    }
}

/// The conformance kit over the seven calls.
fn it_conforms() {
    let (machine, ram, card) = vmm::Machine::new().unwrap();
    let subject = Subject {
        slots: vec![(vmm::SLOT, vmm::RAM as u64 >> 12)],
        written: (vmm::SLOT, vmm::WRITTEN),
        heard: (vmm::SLOT, vmm::HEARD),
        said: |frame| {
            Some(u64::from(u32::from_le_bytes(
                *frame.get(14..)?.first_chunk()?,
            )))
        },
        call: || vmm::frame(b"call"),
        rounds: 40,
        left: None,
        fail: None,
    };
    let verdicts = examine_vm(machine, ram, card, subject).unwrap();
    for verdict in &verdicts {
        println!("{verdict}");
    }
    assert!(verdicts.iter().all(|verdict| verdict.outcome.is_ok()));
}

fn it_survives_its_hosts() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let cable = UnixDatagram::bind(dir.join("cable")).unwrap();
    cable
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    let mut client = Client { cable, last: 0 };
    let mut primary = Process::start(dir, 1, "primary");
    let mut secondary = Process::start(dir, 2, "secondary");
    for round in 0..3 {
        primary.waits_for("Protected");
        client.hears(200, dir);
        let before = client.last;
        primary.kill();
        secondary.waits_for("Promoted");
        client.hears(200, dir);
        println!(
            "round {round}: killed after {before}, at {} now",
            client.last
        );
        let dead = 1 + round % 2;
        // A socket file of the dead is in the way of its cable.
        std::fs::remove_file(dir.join(format!("{dead}-cable"))).unwrap();
        primary = secondary;
        secondary = Process::start(dir, dead, "secondary");
    }
    println!("ok: it survives its hosts");
}

fn its_authors_part_is_short() {
    let lines = include_str!("vmm.rs")
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with("//"))
        .count();
    assert!(lines <= LINES, "{lines} lines, {LINES} are the most");
    println!("ok: its author wrote {lines} lines");
}
