//! One daemon as a process, with everything it says.

use std::{
    fs, io,
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::Host;
use crate::control::{Client, ClientError};

/// How often a daemon that is starting is asked whether it listens.
const KNOCK: Duration = Duration::from_millis(5);
/// How long a status may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A running `colod`; it is killed when this is dropped.
#[derive(Debug)]
pub struct Daemon {
    host: Host,
    child: Child,
    control: PathBuf,
    log: PathBuf,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    events: Mutex<Events>,
    changed: Condvar,
    end: AtomicBool,
}

#[derive(Debug, Default)]
struct Events {
    list: Vec<Value>,
    ended: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Events> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Daemon {
    pub(super) fn start(
        program: &[String],
        arguments: &[&str],
        log: &Path,
        control: &Path,
        host: Host,
    ) -> io::Result<Self> {
        let output = fs::File::create(log)?;
        // A group of its own: a Ctrl-C at the terminal is for the stage, which then ends it.
        let (first, rest) = program.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        let child = Command::new(first)
            .args(rest)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .process_group(0)
            .spawn()?;
        let shared = Arc::new(Shared::default());
        let (told, socket, pid) = (Arc::clone(&shared), control.to_owned(), child.id());
        // Ends with the daemon's end of the connection.
        thread::Builder::new()
            .name("events".into())
            .spawn(move || listen(&socket, pid, &told))?;
        Ok(Self {
            host,
            child,
            control: control.to_owned(),
            log: log.to_owned(),
            shared,
        })
    }

    /// The host it runs on.
    #[must_use]
    pub const fn host(&self) -> Host {
        self.host
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its control socket.
    #[must_use]
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// Its log, so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Everything it has reported so far.
    #[must_use]
    pub fn events(&self) -> Vec<Value> {
        self.shared.lock().list.clone()
    }

    /// Waits for the first event called `name` after the first `skip` events. `None` when
    /// `patience` is over or the daemon has ended.
    #[must_use]
    pub fn wait_for(&self, name: &str, skip: usize, patience: Duration) -> Option<Value> {
        let find = |events: &Events| {
            let mut list = events.list.iter().skip(skip);
            list.find(|event| event["event"] == name).cloned()
        };
        let (events, _) = self
            .shared
            .changed
            .wait_timeout_while(self.shared.lock(), patience, |events| {
                find(events).is_none() && !events.ended
            })
            .unwrap_or_else(PoisonError::into_inner);
        find(&events)
    }

    /// Has a command carried out.
    ///
    /// # Errors
    /// As [`Client::execute`].
    pub fn execute(&self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        let mut client = Client::connect(&self.control)?;
        // Only a patience of zero is refused.
        let _set = client.patience(PATIENCE);
        client.execute(command, arguments)
    }

    /// Its status.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub fn status(&self) -> Result<Value, ClientError> {
        self.execute("status", json!({}))
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// It has ended.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let pid = i32::try_from(self.pid())
            .ok()
            .and_then(Pid::from_raw)
            .ok_or(io::ErrorKind::NotFound)?;
        Ok(kill_process(pid, signal)?)
    }

    /// SIGKILL, and waits until it is gone.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn kill(&mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop)
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits for its end.
    #[must_use]
    pub fn wait_end(&mut self, patience: Duration) -> Option<ExitStatus> {
        let start = Instant::now();
        loop {
            match self.ended() {
                None if start.elapsed() < patience => thread::sleep(KNOCK),
                ended => return ended,
            }
        }
    }

    /// How it ended, in words, with the last line of its log.
    #[must_use]
    pub fn obituary(&mut self) -> Option<String> {
        let status = self.ended()?;
        let how = match (status.code(), status.signal()) {
            (Some(code), _) => format!("exit status {code}"),
            (None, Some(signal)) => format!("signal {signal}"),
            (None, None) => "an unknown end".into(),
        };
        let log = self.log();
        let last = log.lines().last().unwrap_or("its log is empty");
        Some(format!("{} ended with {how}: {last}", self.host.name()))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.shared.end.store(true, Ordering::Release);
        // Already gone is as good.
        let _gone = self.kill();
    }
}

fn listen(control: &Path, pid: u32, shared: &Shared) {
    let alive = || {
        !shared.end.load(Ordering::Acquire)
            && i32::try_from(pid)
                .ok()
                .and_then(Pid::from_raw)
                .is_some_and(|pid| rustix::process::test_kill_process(pid).is_ok())
    };
    let events = loop {
        match Client::connect(control) {
            Ok(client) => break client.events(true).ok(),
            Err(_) if alive() => thread::sleep(KNOCK),
            Err(_) => break None,
        }
    };
    for event in events.into_iter().flatten().map_while(Result::ok) {
        shared.lock().list.push(event);
        shared.changed.notify_all();
    }
    shared.lock().ended = true;
    shared.changed.notify_all();
}
