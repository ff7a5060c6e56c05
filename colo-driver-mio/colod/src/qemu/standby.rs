//! `colod standby`: the secondary of an unmodified QEMU primary, without a VM.

use std::{
    ffi::OsString,
    io::{self, Read},
    path::{Path, PathBuf},
    process::{ChildStdin, ExitStatus},
    time::Duration,
};

use clap::Args;
use colo_proto::{
    id::Epoch,
    qemu::{Expectation, Limits, Name, session::Patience},
};
use serde::Serialize;
use thiserror::Error;

use super::{
    address::{Address, Listener},
    link::{End, Held, Kept, Link, Terms, Told},
    lobby::Lobby,
    monitor::{self, Monitor, Verdict},
    status::Board,
    store::{self, Store},
    takeover,
    wait::{Clock, Stop, Woken},
};

/// How soon a file that could not be written is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Be the COLO secondary of an unmodified QEMU primary, without running a VM.
///
/// Keeps the newest complete checkpoint: a RAM image that changes by whole checkpoints only, and
/// the device state. When the primary is lost, the checkpoint becomes an ordinary migration stream
/// that a QEMU with the same machine, devices and RAM size resumes.
#[derive(Clone, Debug, Args)]
#[command(after_help = "EXAMPLES:\n  \
    colod standby --listen 0.0.0.0:4444 --resume-with \\\n      \
        'qemu-system-x86_64 -M pc-i440fx-7.2 -m 512 ... -incoming fd:0'\n  \
    colod standby --listen unix:/run/colo.sock --state /var/lib/colo --out vm.stream\n  \
    colod standby --state /var/lib/colo --from-state --out vm.stream\n\n\
    On the primary's monitor (QMP):\n  \
    migrate-set-capabilities  {\"capabilities\": [{\"capability\": \"x-colo\", \"state\": true}]}\n  \
    migrate-set-parameters    {\"x-checkpoint-delay\": 50}\n  \
    migrate                   {\"uri\": \"tcp:STANDBY:4444\"}\n\n\
    The stream is the command's standard input: -incoming fd:0, or -incoming 'exec:cat' where \
    descriptor 0 is taken. A file: -incoming 'exec:cat vm.stream'.\n\n\
    Ctrl-C or TERM ends the standby with status 130. While the command runs it is sent TERM \
    instead, with all that it started, and the standby ends when it does; a second signal ends \
    the standby at once.\n\n\
    WHAT THIS DOES NOT PROMISE: QEMU releases its output at once. What the guest sent or wrote to \
    shared storage after the last complete checkpoint has happened for the world and not for the \
    resumed guest. Nor is a primary that is only unreachable known to stand: --fence stops it, --primary-qmp \
    asks one that lives.")]
pub struct StandbyArgs {
    /// Where the primary's `migrate` connects: HOST:PORT or unix:PATH.
    #[arg(long, value_name = "ADDR", required_unless_present = "from_state")]
    pub listen: Option<Address>,
    /// Keep the newest checkpoint in this directory too, replaced atomically.
    #[arg(long, value_name = "DIR", required_unless_present_any = ["resume_with", "out"])]
    pub state: Option<PathBuf>,
    /// Wait for the disk at every checkpoint.
    #[arg(long, requires = "state")]
    pub sync: bool,
    /// Take the checkpoint from --state instead of a primary.
    #[arg(long, requires = "state", conflicts_with = "listen")]
    pub from_state: bool,
    /// Shell command that resumes: it gets the stream on standard input, the checkpoint's number in
    /// `COLO_EPOCH`. A checkpoint is not resumed if its primary spoilt the link and may run on:
    /// only --state and --out keep it then.
    #[arg(long, value_name = "COMMAND")]
    pub resume_with: Option<OsString>,
    /// The primary's monitor (QMP), one that nobody else uses: HOST:PORT or unix:PATH. Before
    /// anything is resumed it is asked: a primary that runs its guest, or ended it in good order,
    /// is not taken over from.
    #[arg(long, value_name = "ADDR")]
    pub primary_qmp: Option<Address>,
    /// Shell command that makes sure that the primary does not run any more. It runs before
    /// --resume-with, and again every second until it succeeds.
    #[arg(long, value_name = "COMMAND", requires = "resume_with")]
    pub fence: Option<OsString>,
    /// Keep a file that says how it stands: one JSON object, replaced atomically.
    #[arg(long, value_name = "FILE")]
    pub status: Option<PathBuf>,
    /// Write the stream to this file, whole or not at all.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Largest guest RAM that is accepted, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 65_536)]
    pub max_memory: u64,
    /// The primary is lost if it stops in the middle of a checkpoint for this long.
    #[arg(long, value_name = "MS", default_value_t = 5_000, value_parser = clap::value_parser!(u64).range(100..))]
    pub silence: u64,
    /// The primary is lost if it starts no checkpoint for this long; must exceed
    /// x-checkpoint-delay. Without it only the connection tells (4 s for a silent host).
    #[arg(long, value_name = "MS")]
    pub idle_silence: Option<u64>,
    /// Accept this machine type only, such as pc-i440fx-7.2.
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub machine: Option<Name>,
    /// A device that checkpoints may lack although the migration had it. Repeatable.
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub optional_device: Vec<Name>,
    /// One JSON object a line instead of text.
    #[arg(long)]
    pub json: bool,
}

fn name(text: &str) -> Result<Name, String> {
    Name::new(text.as_bytes()).ok_or_else(|| "expected 1 to 255 printable characters".into())
}

/// Something a person or a test may want to know.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Event {
    /// Ready for a primary.
    Listening {
        /// Where.
        address: String,
    },
    /// A primary connected.
    Connected,
    /// The monitor given by --primary-qmp cannot be asked.
    NoMonitor {
        /// Why.
        reason: String,
    },
    /// The primary has asked for its first checkpoint: COLO has begun, and what is held is its
    /// newest state.
    Protected {
        /// The version of QEMU by whose rules it speaks.
        qemu: String,
        /// How many multifd channels bring pages.
        channels: usize,
    },
    /// The command given by --fence failed: nothing is resumed yet.
    NotFenced {
        /// How.
        reason: String,
    },
    /// A state is whole: the initial migration (epoch 0) or a checkpoint.
    Whole {
        /// Which.
        epoch: u64,
        /// Pages in it; 0 for the initial migration, whose pages are all there are.
        pages: usize,
        /// Bytes of device state.
        devices: usize,
        /// Microseconds from VMSTATE_SEND, when the primary stands, to its last byte; 0 for the
        /// migration.
        came_us: u64,
        /// Microseconds from its last byte to the reply being sent.
        answered_us: u64,
        /// Bytes of the link so far.
        offset: u64,
    },
    /// The link is over.
    Lost {
        /// Why.
        reason: String,
        /// The newest whole state that it brought, if it brought one.
        epoch: Option<u64>,
        /// Whether it will be resumed.
        resumes: bool,
    },
    /// The stream was written into a file.
    Written {
        /// Length in bytes.
        bytes: u64,
        /// Microseconds since the loss.
        after_us: u64,
    },
    /// The stream could not be written into a file.
    NotWritten {
        /// Why.
        reason: String,
    },
    /// The command has taken the whole stream.
    Piped {
        /// Length in bytes.
        bytes: u64,
        /// Microseconds since the loss.
        after_us: u64,
    },
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// Asked to stop.
    Stopped,
    /// A checkpoint was turned into a stream; the status is the command's, if there was one.
    Resumed(Epoch, Option<ExitStatus>),
}

/// Why it could not go on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StandbyError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {error}")]
    Listen {
        /// The address.
        address: Address,
        /// The system's word.
        error: io::Error,
    },
    /// The state directory fails.
    #[error("state directory {}: {error}", .dir.display())]
    State {
        /// The directory.
        dir: PathBuf,
        /// The system's word.
        error: io::Error,
    },
    /// The stream could not be written.
    #[error("cannot write the stream to {to}: {error}")]
    Resume {
        /// The file or the command.
        to: String,
        /// The system's word.
        error: io::Error,
    },
    /// The primary is not lost.
    #[error("nothing is resumed: the primary's monitor says: {keeps}")]
    Alive {
        /// What its monitor says.
        keeps: String,
    },
    /// Nothing to listen on and nothing to take from.
    #[error("nothing to do: give --listen, or --state with --from-state")]
    Nothing,
    /// A system call failed.
    #[error(transparent)]
    System(#[from] io::Error),
}

/// Runs until a checkpoint was resumed or `stop` is asked. While the command runs that asks the
/// command.
///
/// # Errors
/// What this side could not do. A primary's faults are events.
pub fn run(
    args: &StandbyArgs,
    stop: &Stop,
    on: &mut dyn FnMut(Event),
) -> Result<Outcome, StandbyError> {
    let mut board = args.status.as_deref().map(Board::new);
    let on = &mut |event: Event| {
        if let Some(board) = &mut board {
            board.show(&event);
        }
        on(event);
    };
    if let Some(out) = &args.out {
        takeover::can_write(out).map_err(|e| resume_error(out.display(), e))?;
    }
    if args.from_state {
        return from_state(args, stop, on);
    }
    let address = args.listen.as_ref().ok_or(StandbyError::Nothing)?;
    let listener = Listener::bind(address).map_err(|error| StandbyError::Listen {
        address: address.clone(),
        error,
    })?;
    let store = |dir: &Path| Store::open(dir, args.sync).map_err(|e| state_error(dir, e));
    let mut store = args.state.as_deref().map(store).transpose()?;
    let mut lobby = Lobby::new(listener, Duration::from_millis(args.silence));
    on(Event::Listening {
        address: lobby.address()?.to_string(),
    });
    let clock = Clock::start();
    // What `--out` does not have yet. It is for the file only: the primary ran on after it.
    let mut unwritten: Option<Held> = None;
    loop {
        lobby.look(clock.now())?;
        let Some(primary) = lobby.primary() else {
            let again = unwritten.as_ref().map(|_| clock.now() + RETRY);
            let deadline = again.into_iter().chain(lobby.deadline()).min();
            match clock.wait_any(lobby.fds(), deadline, stop)? {
                Woken::Stop => return Ok(Outcome::Stopped),
                Woken::Deadline => {
                    unwritten = unwritten.filter(|held| write_out(args, held, clock, on).is_err());
                }
                Woken::Ready => {}
            }
            continue;
        };
        on(Event::Connected);
        let mut monitor = monitor(args, clock, stop, on);
        let link = Link::new(primary, terms(args), clock, stop);
        let (end, held) = link.serve(&mut lobby, |told| {
            let kept = match told {
                Told::Began {
                    generation,
                    channels,
                } => {
                    let qemu = generation.map_or_else(String::new, |g| g.to_string());
                    on(Event::Protected { qemu, channels });
                    return Ok(());
                }
                Told::Kept(kept) => kept,
            };
            unwritten = None;
            if let Some(monitor) = &mut monitor {
                monitor.listen();
            }
            on(whole(&kept));
            match &mut store {
                Some(store) => store.keep(&kept.held.state, &kept.held.image, kept.changed),
                None => Ok(()),
            }
        })?;
        lobby.forget_channels();
        let (mut reason, owner) = match end {
            End::Stopped => return Ok(Outcome::Stopped),
            End::Refused(error) => (error.to_string(), None),
            End::Lost(lost, owner) => (lost.to_string(), owner),
        };
        let newest = held.as_ref().map(|held| held.state.epoch);
        let mut resumes = owner.is_some() && owner == newest;
        if resumes && let Some(keeps) = keeps(args, monitor, clock, stop) {
            resumes = false;
            reason = format!("{reason}; its monitor says: {keeps}");
        }
        on(Event::Lost {
            reason,
            epoch: newest.map(|epoch| epoch.0),
            resumes,
        });
        let Some(held) = held else { continue };
        let written = write_out(args, &held, clock, on);
        if resumes {
            // Nobody else may believe to be protected here.
            drop(lobby);
            return resume(args, &held, written, stop, clock, on);
        }
        unwritten = written.is_err().then_some(held);
    }
}

/// This side has the VM. A file that cannot be written is an error afterwards: it must not cost the
/// guest.
fn resume(
    args: &StandbyArgs,
    held: &Held,
    mut written: Result<(), StandbyError>,
    stop: &Stop,
    clock: Clock,
    on: &mut dyn FnMut(Event),
) -> Result<Outcome, StandbyError> {
    // With neither command nor directory nothing but the file will remain of it.
    let alone = args.resume_with.is_none() && args.state.is_none();
    while alone && written.is_err() {
        if clock.pause(clock.now() + RETRY, stop)? {
            return written.map(|()| Outcome::Stopped);
        }
        written = write_out(args, held, clock, on);
    }
    let epoch = held.state.epoch;
    if !fenced(args, epoch, stop, clock, on)? {
        return written.map(|()| Outcome::Stopped);
    }
    let pipe = |stdin| takeover::write(&held.state, &held.image, stdin);
    let status = command(args, epoch, stop, pipe, clock, on)?;
    written.map(|()| Outcome::Resumed(epoch, status))
}

/// The monitor of a primary that has just connected, if there is one to be asked.
fn monitor(
    args: &StandbyArgs,
    clock: Clock,
    stop: &Stop,
    on: &mut dyn FnMut(Event),
) -> Option<Monitor> {
    let address = args.primary_qmp.as_ref()?;
    Monitor::open(address, clock, stop)
        .map_err(|error| {
            let reason = format!("{address}: {error}");
            on(Event::NoMonitor { reason });
        })
        .ok()
}

/// What the primary's monitor says against a resume. One that was not open is tried once more.
fn keeps(
    args: &StandbyArgs,
    monitor: Option<Monitor>,
    clock: Clock,
    stop: &Stop,
) -> Option<String> {
    let address = args.primary_qmp.as_ref()?;
    let monitor = monitor.or_else(|| Monitor::open(address, clock, stop).ok());
    match monitor?.verdict(clock, stop) {
        Verdict::Keeps(why) => Some(why),
        Verdict::Gone | Verdict::HandedOver => None,
    }
}

/// Fences until it succeeds; whether it did before `stop` was asked.
fn fenced(
    args: &StandbyArgs,
    epoch: Epoch,
    stop: &Stop,
    clock: Clock,
    on: &mut dyn FnMut(Event),
) -> Result<bool, StandbyError> {
    let Some(command) = &args.fence else {
        return Ok(true);
    };
    while let Err(error) = monitor::fence(command, epoch) {
        let reason = format!("the command given by --fence failed: {error}");
        on(Event::NotFenced { reason });
        if clock.pause(clock.now() + RETRY, stop)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn terms(args: &StandbyArgs) -> Terms {
    Terms {
        limits: Limits {
            ram: args.max_memory.saturating_mul(1 << 20),
            ..Limits::default()
        },
        expect: Expectation {
            machine: args.machine.clone(),
            optional_devices: args.optional_device.clone(),
            ..Expectation::default()
        },
        patience: Patience {
            within: Duration::from_millis(args.silence),
            between: args.idle_silence.map(Duration::from_millis),
        },
    }
}

fn whole(kept: &Kept<'_>) -> Event {
    Event::Whole {
        epoch: kept.held.state.epoch.0,
        pages: kept.changed.pages(),
        devices: kept.held.state.devices.bytes().len(),
        came_us: micros(kept.came),
        answered_us: micros(kept.answered),
        offset: kept.offset,
    }
}

/// Writes what is held to `--out`, also if it is not resumed: somebody may want to later.
fn write_out(
    args: &StandbyArgs,
    held: &Held,
    clock: Clock,
    on: &mut dyn FnMut(Event),
) -> Result<(), StandbyError> {
    let Some(path) = &args.out else {
        return Ok(());
    };
    let start = clock.now();
    let written = takeover::to_file(path, |f| takeover::write(&held.state, &held.image, f));
    let written = written.map_err(|e| resume_error(path.display(), e));
    on(match &written {
        Ok(bytes) => Event::Written {
            bytes: *bytes,
            after_us: micros(clock.now().since(start)),
        },
        Err(error) => Event::NotWritten {
            reason: error.to_string(),
        },
    });
    written.map(drop)
}

/// Takes the checkpoint from the state directory.
fn from_state(
    args: &StandbyArgs,
    stop: &Stop,
    on: &mut dyn FnMut(Event),
) -> Result<Outcome, StandbyError> {
    let dir = args.state.as_deref().ok_or(StandbyError::Nothing)?;
    let clock = Clock::start();
    let newest = || -> Result<(Epoch, Box<dyn Read>), StandbyError> {
        let (newest, stream) = store::newest(dir).map_err(|e| state_error(dir, e))?;
        Ok((Epoch(newest.epoch), Box::new(stream)))
    };
    let (mut epoch, mut stream) = newest()?;
    if let Some(path) = &args.out {
        let written = takeover::to_file(path, |mut f| io::copy(&mut stream, &mut f));
        on(Event::Written {
            bytes: written.map_err(|e| resume_error(path.display(), e))?,
            after_us: micros(clock.now().since(colo_proto::time::Instant::ZERO)),
        });
        (epoch, stream) = newest()?;
    }
    if let Some(keeps) = keeps(args, None, clock, stop) {
        return Err(StandbyError::Alive { keeps });
    }
    if !fenced(args, epoch, stop, clock, on)? {
        return Ok(Outcome::Stopped);
    }
    let pipe = |mut stdin: ChildStdin| io::copy(&mut stream, &mut stdin);
    let status = command(args, epoch, stop, pipe, clock, on)?;
    Ok(Outcome::Resumed(epoch, status))
}

fn command(
    args: &StandbyArgs,
    epoch: Epoch,
    stop: &Stop,
    pipe: impl FnOnce(ChildStdin) -> io::Result<u64>,
    clock: Clock,
    on: &mut dyn FnMut(Event),
) -> Result<Option<ExitStatus>, StandbyError> {
    let Some(command) = &args.resume_with else {
        return Ok(None);
    };
    let lost = clock.now();
    let status = takeover::to_command(epoch, command, stop, pipe, |bytes| {
        on(Event::Piped {
            bytes,
            after_us: micros(clock.now().since(lost)),
        });
    });
    let status = status.map_err(|e| resume_error(command.display(), e))?;
    Ok(Some(status))
}

fn state_error(dir: &Path, error: io::Error) -> StandbyError {
    StandbyError::State {
        dir: dir.to_owned(),
        error,
    }
}

fn resume_error(to: impl ToString, error: io::Error) -> StandbyError {
    StandbyError::Resume {
        to: to.to_string(),
        error,
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
