//! How other threads talk to the loop: commands and their answers, status, the stream of events.
//!
//! The daemon's control socket and its signal handling stand on this.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::time::Duration;

use colo_proto::{
    command::{Answer, Command},
    event::Event,
    id::Channel,
    time::Instant,
};

use crate::{Wake, metrics::Snapshot};

/// Reports that a subscriber may be behind before it loses the stream.
const BEHIND_MOST: usize = 4096;

/// A handle on a running loop. Cheap to clone, usable from any thread.
#[derive(Clone, Debug)]
pub struct ControlHandle {
    asks: Sender<Ask>,
    wake: Wake,
}

/// What happened, as told to subscribers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// When, on [`clock::now`](crate::clock::now).
    pub at: Instant,
    /// What.
    pub what: What,
}

/// The subject of a [`Report`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum What {
    /// The machine reports.
    Machine(Event),
    /// A channel is connected and joined.
    Up(Channel),
    /// A channel ended; why.
    Down(Channel, String),
    /// A channel could not be connected; why. It is tried again.
    NotConnected(Channel, String),
    /// A caller was sent away; why.
    CallerRefused(String),
    /// The record could not be written; why. It is tried again, and what depends on it waits.
    RecordNotWritten(String),
}

/// The loop is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AskError {
    /// The loop has ended.
    #[error("the daemon's loop has ended")]
    Ended,
    /// No answer in time. A command may still be carried out.
    #[error("no answer within {0:?}")]
    Late(Duration),
}

#[derive(Debug)]
pub(crate) enum Ask {
    Command(Command, Sender<Answer>),
    Snapshot(Sender<Snapshot>),
    Subscribe(SyncSender<Report>),
    Stop,
}

impl ControlHandle {
    /// What wakes the loop.
    pub(crate) fn wake(&self) -> Wake {
        self.wake.clone()
    }

    pub(crate) fn new(wake: Wake) -> (Self, Receiver<Ask>) {
        let (asks, inbox) = channel();
        (Self { asks, wake }, inbox)
    }

    /// Submits a command. The answer comes when the command has been carried out or refused,
    /// which for a checkpoint or a failover takes as long as that takes; if the loop ends first,
    /// the channel closes.
    ///
    /// # Errors
    /// When the loop has ended.
    pub fn submit(&self, command: Command) -> Result<Receiver<Answer>, AskError> {
        let (answer, answered) = channel();
        self.ask(Ask::Command(command, answer))?;
        Ok(answered)
    }

    /// Submits a command and waits for its answer.
    ///
    /// # Errors
    /// When the loop has ended or the answer takes longer than `patience`.
    pub fn command(&self, command: Command, patience: Duration) -> Result<Answer, AskError> {
        wait(&self.submit(command)?, patience)
    }

    /// Status and counters now.
    ///
    /// # Errors
    /// When the loop has ended or does not answer within a second.
    pub fn snapshot(&self) -> Result<Snapshot, AskError> {
        let (answer, answered) = channel();
        self.ask(Ask::Snapshot(answer))?;
        wait(&answered, Duration::from_secs(1))
    }

    /// Every report from now on: nothing that is asked through this handle later is missed. A subscriber that falls more than 4,096 reports behind loses the
    /// stream: it closes.
    ///
    /// # Errors
    /// When the loop has ended.
    pub fn subscribe(&self) -> Result<Receiver<Report>, AskError> {
        let (reports, stream) = sync_channel(BEHIND_MOST);
        self.ask(Ask::Subscribe(reports))?;
        Ok(stream)
    }

    /// Ends the loop: [`Driver::run`](crate::Driver::run) returns when what was handed to the
    /// sockets is sent, or after half a second. A VM that is to end in good order is told
    /// [`Command::Shutdown`] first.
    pub fn stop(&self) {
        // A loop that is gone has stopped.
        let _gone = self.ask(Ask::Stop);
    }

    fn ask(&self, ask: Ask) -> Result<(), AskError> {
        self.asks.send(ask).map_err(|_| AskError::Ended)?;
        self.wake.wake();
        Ok(())
    }
}

fn wait<T>(answered: &Receiver<T>, patience: Duration) -> Result<T, AskError> {
    answered.recv_timeout(patience).map_err(|e| match e {
        RecvTimeoutError::Timeout => AskError::Late(patience),
        RecvTimeoutError::Disconnected => AskError::Ended,
    })
}
