//! `colod feed`: the primary's role towards an unmodified QEMU secondary.

use std::{
    io::{self, Read as _, Write as _},
    os::fd::AsFd as _,
    path::PathBuf,
    time::Duration,
};

use clap::Args;
use colo_proto::{
    qemu::{
        Expectation, Item, Limits, Message, Reader, StreamError,
        session::{FeedError as Refused, Feeder},
    },
    time::Instant,
};
use serde::Serialize;
use thiserror::Error;

use super::{
    address::{Address, Stream},
    capture::{self, Visitor, WalkError},
    wait::{Clock, Stop, Woken},
};

/// Be the COLO primary of an unmodified QEMU secondary, replaying a captured session.
///
/// Sends the migration and then each whole checkpoint of the capture, waiting for every reply, as
/// a primary would. What the capture has after its last whole checkpoint is not sent. When it
/// ends, the secondary sees its primary go and runs on when told to.
#[derive(Clone, Debug, Args)]
#[command(after_help = "EXAMPLE:\n  \
    qemu-system-x86_64 -M pc-i440fx-7.2 ... -incoming tcp:0:4444 -qmp unix:qmp.sock,server,nowait\n  \
    (QMP)  migrate-set-capabilities {\"capabilities\": [{\"capability\": \"x-colo\", \"state\": true}]}\n  \
    colod feed --connect 127.0.0.1:4444 session.p2s.xz\n  \
    (QMP)  x-colo-lost-heartbeat\n\n\
    The secondary's machine type, devices and RAM size must be those of the capture; \
    `colod inspect` shows them.")]
pub struct FeedArgs {
    /// Where the secondary listens: HOST:PORT or unix:PATH.
    #[arg(long, value_name = "ADDR")]
    pub connect: Address,
    /// The captured stream, plain or xz; - is standard input.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Stop after this many checkpoints.
    #[arg(long, value_name = "N")]
    pub checkpoints: Option<u64>,
    /// Pause between checkpoints.
    #[arg(long, value_name = "MS", default_value_t = 0)]
    pub interval: u64,
    /// How long the secondary may take for a reply. Its first load copies all its RAM.
    #[arg(long, value_name = "MS", default_value_t = 30_000)]
    pub patience: u64,
    /// One JSON object a line instead of text.
    #[arg(long)]
    pub json: bool,
}

/// Something a person or a test may want to know.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Event {
    /// The secondary has loaded the migration and runs.
    Ready {
        /// Bytes sent.
        bytes: u64,
    },
    /// The secondary has applied a checkpoint.
    Loaded {
        /// Which, from 1.
        epoch: u64,
        /// Bytes sent so far.
        bytes: u64,
        /// Microseconds from the request to the last reply.
        took_us: u64,
    },
}

/// Why feeding ended early.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FeedError {
    /// The secondary cannot be reached.
    #[error("cannot connect to {address}: {error}")]
    Connect {
        /// Where.
        address: Address,
        /// The system's word.
        error: io::Error,
    },
    /// The capture cannot be read.
    #[error("{}: {error}", .file.display())]
    Capture {
        /// The capture.
        file: PathBuf,
        /// The system's word.
        error: io::Error,
    },
    /// The capture is damaged: nothing of the damaged part was sent.
    #[error("the capture is damaged: {0}")]
    Damaged(#[from] StreamError),
    /// The secondary did not keep to the protocol, or went away.
    #[error(transparent)]
    Secondary(#[from] Refused),
    /// Asked to stop.
    #[error("interrupted")]
    Stopped,
    /// A system call failed.
    #[error(transparent)]
    System(#[from] io::Error),
}

/// Replays the capture; returns how many checkpoints the secondary has applied.
///
/// # Errors
/// Why it ended early.
pub fn run(args: &FeedArgs, stop: &Stop, on: &mut dyn FnMut(Event)) -> Result<u64, FeedError> {
    let source = capture::open(&args.file).map_err(|error| FeedError::Capture {
        file: args.file.clone(),
        error,
    })?;
    let stream = Stream::connect(&args.connect).map_err(|error| FeedError::Connect {
        address: args.connect.clone(),
        error,
    })?;
    let clock = Clock::start();
    let mut feed = Feed {
        stream,
        clock,
        stop,
        feeder: Feeder::new(clock.now(), Duration::from_millis(args.patience)),
        args,
        pending: Vec::new(),
        items: Vec::new(),
        request: 0,
        in_checkpoint: false,
        sent: 0,
        on,
    };
    let mut reader = Reader::new(Limits::default(), Expectation::default());
    match capture::walk(source, &mut reader, &mut feed) {
        Ok(()) => {}
        // A capture may end anywhere: what is not whole was not sent.
        Err(WalkError::Stream(cut)) if feed.cut_is_harmless(&cut) => {
            tracing::info!("the capture ends inside a checkpoint, which was left out: {cut}");
        }
        Err(WalkError::Stream(fault)) => return Err(fault.into()),
        Err(WalkError::Read(error)) => {
            return Err(FeedError::Capture {
                file: args.file.clone(),
                error,
            });
        }
        Err(WalkError::Visitor(Ended::Enough)) => {}
        Err(WalkError::Visitor(Ended::Early(error))) => return Err(error),
    }
    Ok(feed.feeder.checkpoints())
}

struct Feed<'a> {
    stream: Stream,
    clock: Clock,
    stop: &'a Stop,
    feeder: Feeder,
    args: &'a FeedArgs,
    /// Bytes that wait for a reply, or for the rest of their checkpoint.
    pending: Vec<u8>,
    /// What those of the checkpoint are, behind its request.
    items: Vec<Item>,
    /// How many of them are the checkpoint's request.
    request: usize,
    in_checkpoint: bool,
    sent: u64,
    on: &'a mut dyn FnMut(Event),
}

enum Ended {
    Enough,
    Early(FeedError),
}

impl<E: Into<FeedError>> From<E> for Ended {
    fn from(error: E) -> Self {
        Self::Early(error.into())
    }
}

/// Sent onward at once in the initial migration.
const CHUNK: usize = 1 << 18;

impl Visitor for Feed<'_> {
    type Error = Ended;

    fn item(&mut self, item: &Item, _: &Reader) -> Result<(), Ended> {
        match item {
            Item::Message(Message::CheckpointRequest) => {
                self.in_checkpoint = true;
                self.request = self.pending.len();
            }
            Item::Blob(_) => {
                self.items.push(item.clone());
                self.checkpoint()?;
                self.enough()?;
                let pause = self.clock.now() + Duration::from_millis(self.args.interval);
                self.pause(pause)?;
            }
            _ if self.in_checkpoint => self.items.push(item.clone()),
            Item::Description(_) => {
                self.flush()?;
                self.feeder.handle_sent(self.clock.now(), item)?;
                self.replies()?;
                (self.on)(Event::Ready { bytes: self.sent });
                self.enough()?;
            }
            // Nothing is owed before the migration ends: it is told as it is read.
            _ => self.feeder.handle_sent(self.clock.now(), item)?,
        }
        Ok(())
    }

    fn page(&mut self, bytes: &[u8]) -> Result<(), Ended> {
        self.raw(bytes)
    }

    fn raw(&mut self, bytes: &[u8]) -> Result<(), Ended> {
        self.pending.extend_from_slice(bytes);
        // The migration is sent as it comes, a checkpoint when it is whole.
        if !self.in_checkpoint && self.pending.len() >= CHUNK {
            self.flush()?;
        }
        Ok(())
    }
}

impl Feed<'_> {
    /// Sends a checkpoint that is whole in `pending`: the request, and the rest after the reply.
    fn checkpoint(&mut self) -> Result<(), FeedError> {
        let start = self.clock.now();
        let whole = std::mem::take(&mut self.pending);
        let (request, rest) = whole.split_at(self.request.min(whole.len()));
        self.send(request)?;
        let request = Item::Message(Message::CheckpointRequest);
        self.feeder.handle_sent(self.clock.now(), &request)?;
        self.replies()?;
        self.send(rest)?;
        for item in self.items.drain(..) {
            self.feeder.handle_sent(self.clock.now(), &item)?;
        }
        self.replies()?;
        self.in_checkpoint = false;
        let took = self.clock.now().since(start);
        (self.on)(Event::Loaded {
            epoch: self.feeder.checkpoints(),
            bytes: self.sent,
            took_us: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
        });
        Ok(())
    }

    fn enough(&self) -> Result<(), Ended> {
        match self.args.checkpoints {
            Some(n) if self.feeder.checkpoints() >= n => Err(Ended::Enough),
            _ => Ok(()),
        }
    }

    /// Whether the capture just ends, after the migration.
    fn cut_is_harmless(&self, cut: &StreamError) -> bool {
        cut.fault == colo_proto::qemu::Fault::Truncated
            && (self.in_checkpoint || self.feeder.checkpoints() > 0)
    }

    fn flush(&mut self) -> Result<(), FeedError> {
        let pending = std::mem::take(&mut self.pending);
        self.send(&pending)
    }

    fn send(&mut self, mut bytes: &[u8]) -> Result<(), FeedError> {
        while !bytes.is_empty() {
            match (&self.stream).write(bytes) {
                Ok(n) => {
                    self.sent += n as u64;
                    bytes = bytes.get(n..).unwrap_or_default();
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let deadline = self.clock.now() + Duration::from_millis(self.args.patience);
                    match self
                        .clock
                        .wait(self.stream.as_fd(), true, Some(deadline), self.stop)?
                    {
                        Woken::Ready => {}
                        Woken::Stop => return Err(FeedError::Stopped),
                        Woken::Deadline => {
                            return Err(io::Error::from(io::ErrorKind::TimedOut).into());
                        }
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Waits until no reply is owed.
    fn replies(&mut self) -> Result<(), FeedError> {
        let mut buffer = [0; 64];
        while !self.feeder.may_send() {
            let deadline = self.feeder.poll_timeout();
            match self
                .clock
                .wait(self.stream.as_fd(), false, deadline, self.stop)?
            {
                Woken::Ready => {}
                Woken::Stop => return Err(FeedError::Stopped),
                Woken::Deadline => {
                    self.feeder.handle_timeout(self.clock.now())?;
                    continue;
                }
            }
            match (&self.stream).read(&mut buffer) {
                Ok(0) => {
                    self.feeder.handle_closed()?;
                    return Ok(());
                }
                Ok(n) => {
                    let bytes = buffer.get(..n).unwrap_or_default();
                    self.feeder.handle_bytes(self.clock.now(), bytes)?;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.feeder.handle_closed()?,
            }
        }
        Ok(())
    }

    /// Lets the interval pass; the secondary says nothing in it.
    fn pause(&mut self, until: Instant) -> Result<(), FeedError> {
        if self.args.interval == 0 {
            return Ok(());
        }
        match self
            .clock
            .wait(self.stream.as_fd(), false, Some(until), self.stop)?
        {
            Woken::Deadline => Ok(()),
            Woken::Stop => Err(FeedError::Stopped),
            Woken::Ready => self.replies(),
        }
    }
}
