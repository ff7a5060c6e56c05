//! A QEMU process with the `dirty` guest in it.

use std::{
    ffi::OsStr,
    fs::File,
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use colo_guests::stats;
use serde_json::json;
use tempfile::TempDir;

use crate::{qmp::Qmp, versions::Qemu};

/// The guest's counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Counters {
    pub(crate) progress: u64,
    pub(crate) errors: u64,
    pub(crate) verified: u64,
    magic: u64,
}

impl Counters {
    /// From the words at [`stats::ADDRESS`].
    pub(crate) fn new(words: &[u64]) -> Self {
        let at = |address: u64| words[((address - stats::ADDRESS) / 8) as usize];
        Self {
            progress: at(stats::PROGRESS),
            errors: at(stats::ERRORS),
            verified: at(stats::VERIFIED),
            magic: at(stats::MAGIC),
        }
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.magic.to_le_bytes() == *b"COLODIRT"
    }
}

/// How QEMU is started.
pub(crate) struct Machine {
    qemu: Qemu,
    dir: TempDir,
    arguments: Vec<String>,
    count: std::cell::Cell<u32>,
}

impl Machine {
    /// The `dirty` guest on `memory` MiB.
    pub(crate) fn dirty(qemu: Qemu, memory: u32) -> Self {
        let machine = Self::bare(qemu, memory);
        let kernel = machine.path("guest.elf");
        std::fs::write(&kernel, colo_guests::DIRTY).unwrap();
        let append = format!(
            "pages=64 period_us=5000 ws=1024 verify=64 quiet=1{}",
            tsc_khz().map_or(String::new(), |khz| format!(" tsc_khz={khz}"))
        );
        let kernel = kernel.to_str().unwrap().to_owned();
        machine.with(&["-kernel", &kernel, "-append", &append])
    }

    /// No guest: one comes with a migration.
    pub(crate) fn bare(qemu: Qemu, memory: u32) -> Self {
        let arguments = ["-M", "pc", "-accel", "kvm", "-cpu", "qemu64,-kvmclock"];
        let quiet = ["-nodefaults", "-display", "none", "-no-reboot"];
        let memory = ["-m".to_owned(), memory.to_string()];
        let arguments = arguments.iter().chain(&quiet).map(|a| (*a).to_owned());
        Self {
            qemu,
            dir: tempfile::tempdir().unwrap(),
            arguments: arguments.chain(memory).collect(),
            count: 0.into(),
        }
    }

    pub(crate) fn with(mut self, more: &[&str]) -> Self {
        self.arguments.extend(more.iter().map(|a| (*a).to_owned()));
        self
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts a process.
    pub(crate) fn start(&self, more: &[&str]) -> Vm {
        let (listener, monitor) = self.monitor();
        let said = self.path(&format!("stderr-{}", self.count.get()));
        let mut command = Command::new(self.qemu.binary().unwrap());
        command.args(&self.arguments).args(more);
        command.args(monitor);
        let child = command
            .stdin(Stdio::null())
            .stderr(File::create(&said).unwrap())
            .spawn()
            .unwrap();
        let child = Reaped { child, said };
        Vm {
            qmp: Qmp::accept(&listener),
            process: Some(child),
            return_path: self.qemu.return_path,
        }
    }

    /// A shell command that starts a process with its incoming stream on standard input, and where
    /// its monitor will connect.
    pub(crate) fn resume_command(&self, more: &str) -> (UnixListener, String) {
        let (listener, monitor) = self.monitor();
        let quoted: Vec<String> = self
            .arguments
            .iter()
            .cloned()
            .chain(monitor)
            .map(|a| format!("'{a}'"))
            .collect();
        let command = format!(
            "exec {} {} -incoming fd:0 {more} 2>/dev/null",
            self.qemu.binary().unwrap(),
            quoted.join(" ")
        );
        (listener, command)
    }

    fn monitor(&self) -> (UnixListener, [String; 4]) {
        self.count.set(self.count.get() + 1);
        let path = self.path(&format!("qmp-{}", self.count.get()));
        let listener = UnixListener::bind(&path).unwrap();
        let chardev = format!("socket,id=qmp,path={}", path.display());
        let monitor = ["-chardev", &chardev, "-mon", "chardev=qmp,mode=control"];
        (listener, monitor.map(str::to_owned))
    }
}

/// A running QEMU; it dies with this value.
pub(crate) struct Vm {
    pub(crate) qmp: Qmp,
    process: Option<Reaped>,
    return_path: bool,
}

impl Vm {
    /// One that somebody else started.
    pub(crate) fn attach(listener: &UnixListener) -> Self {
        Self {
            qmp: Qmp::accept(listener),
            process: None,
            return_path: false,
        }
    }

    pub(crate) fn counters(&mut self) -> Counters {
        Counters::new(&self.qmp.words(stats::ADDRESS, 6))
    }

    /// Waits until the guest says that `enough`.
    pub(crate) fn wait_until(&mut self, enough: impl Fn(&Counters) -> bool) -> Counters {
        let start = std::time::Instant::now();
        loop {
            let counters = self.counters();
            assert_eq!(counters.errors, 0, "{counters:?}");
            if enough(&counters) {
                return counters;
            }
            let patience = std::time::Duration::from_secs(60);
            assert!(start.elapsed() < patience, "{counters:?}");
            // The guest has no way to tell: its memory is looked at now and then.
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    /// Waits until an incoming stream is loaded and the guest runs.
    pub(crate) fn wait_until_running(&mut self) {
        while self.qmp.run("query-status", json!({}))["running"] != true {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    /// Makes it the primary of `uri`.
    pub(crate) fn protect(&mut self, uri: &str, delay_ms: u32) {
        self.capabilities(&[]);
        self.qmp.run(
            "migrate-set-parameters",
            json!({"x-checkpoint-delay": delay_ms}),
        );
        self.qmp.run("migrate", json!({"uri": uri}));
    }

    /// Switches on what COLO needs, and `more`.
    pub(crate) fn capabilities(&mut self, more: &[&str]) {
        let needed: &[&str] = if self.return_path {
            &["x-colo", "return-path"]
        } else {
            &["x-colo"]
        };
        let on = |name: &&str| json!({"capability": name, "state": true});
        let all: Vec<_> = needed.iter().chain(more).map(on).collect();
        self.qmp
            .run("migrate-set-capabilities", json!({"capabilities": all}));
    }

    /// SIGKILL.
    pub(crate) fn kill(mut self) {
        self.process = None;
    }

    /// SIGSTOP: it stays, and does nothing more.
    pub(crate) fn hang(&self) {
        let child = &self.process.as_ref().unwrap().child;
        let pid = rustix::process::Pid::from_child(child);
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    }

    pub(crate) fn quit(mut self) {
        self.qmp.run("quit", json!({}));
    }
}

/// A process, and the file it writes its complaints to: a failing test shows them.
struct Reaped {
    child: Child,
    said: PathBuf,
}

impl Drop for Reaped {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let said = std::fs::read_to_string(&self.said).unwrap_or_default();
            eprintln!("QEMU ended with {:?}: {said}", self.child.try_wait());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The host's time-stamp counter rate: calibrating against an emulated timer goes wrong on a busy
/// machine.
fn tsc_khz() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("cpu MHz"))?;
    let mhz: f64 = line.split(':').nth(1)?.trim().parse().ok()?;
    Some((mhz * 1000.0) as u64)
}

/// The counters in a stream that `standby` wrote.
pub(crate) fn counters_in(stream: &Path) -> Counters {
    use colo_proto::qemu::{Expectation, Item, Limits, Reader};
    let mut bytes = std::fs::read(stream).unwrap();
    // The reader wants COLO; an ordinary migration lacks only its command.
    let name = u32::from_be_bytes(bytes[9..13].try_into().unwrap()) as usize;
    bytes.splice(13 + name..13 + name, *b"\x08\0\x08\0\0");
    let mut reader = Reader::new(Limits::default(), Expectation::default());
    let (mut input, mut words) = (&bytes[..], None);
    while let Some(item) = reader.skip_pages(&mut input).unwrap() {
        if let Item::Page(page) = item
            && (page.slot.0, page.page * 4096) == (0, stats::ADDRESS)
            && !page.zero
        {
            let at = reader.offset() as usize;
            let word = |w: &[u8]| u64::from_le_bytes(w.try_into().unwrap());
            words = Some(bytes[at..at + 48].chunks(8).map(word).collect::<Vec<_>>());
        }
    }
    reader.finish().unwrap();
    Counters::new(&words.unwrap())
}

/// An argument list as clap wants it, from words.
pub(crate) fn arguments<'a, A: AsRef<OsStr> + ?Sized + 'a>(
    words: impl IntoIterator<Item = &'a A>,
) -> Vec<std::ffi::OsString> {
    words.into_iter().map(|w| w.as_ref().to_owned()).collect()
}
