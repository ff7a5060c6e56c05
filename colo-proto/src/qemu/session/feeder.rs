//! The primary's role with a recording behind it: what may be sent when.

use alloc::boxed::Box;
use core::time::Duration;

use thiserror::Error;

use super::{
    super::{
        error::StreamError,
        item::Item,
        limits::Limits,
        message::{Message, Replies},
    },
    machine::{self, Translated as _, never},
};
use crate::{
    command::{Command, CommandId},
    error::{ConfigError, PeerFault},
    event::Event,
    id::Epoch,
    machine::{Captured, GuestDone, GuestOp, Input, Machine as _, Output},
    primary::Primary,
    ram::PageSet,
    time::Instant,
    wire::{FLAG_LIVE, Kind},
};

/// Why feeding ended early.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FeedError {
    /// The secondary sent what it must not.
    #[error(transparent)]
    Faulty(#[from] StreamError),
    /// The secondary answered what it was not asked.
    #[error("the secondary sent {} before it was due", .reply.name())]
    Unasked {
        /// The reply.
        reply: Message,
    },
    /// The secondary closed the link.
    #[error("the secondary closed the link while {} was due", .due.name())]
    Closed {
        /// The reply that was due.
        due: Message,
    },
    /// The secondary did not answer.
    #[error("the secondary did not send {} within {patience:?}", .due.name())]
    Silent {
        /// The reply that was due.
        due: Message,
        /// How long it had.
        patience: Duration,
    },
    /// The captured machine is more than this side can send.
    #[error("the captured machine cannot be sent: {0}")]
    Unfit(#[from] ConfigError),
    /// The reply was due and the machine behind it does not agree: a fault of this side.
    #[error("the primary's machine refuses what the dialect allows: {0}")]
    OutOfStep(PeerFault),
    /// The capture's pages went over multifd channels and are not in it.
    #[error(
        "the capture is of a link with multifd: its pages went over channels that are not in it"
    )]
    Multifd,
    /// An item was sent that this side's machine had not asked for.
    #[error("{item} was sent before it was due")]
    OutOfTurn {
        /// What was sent.
        item: &'static str,
    },
}

/// The primary's role: items go out as long as no reply is owed.
///
/// The guest behind the machine is the recording: it has captured what the items say.
#[derive(Clone, Debug)]
pub struct Feeder {
    replies: Replies,
    patience: Duration,
    since: Instant,
    checkpoints: u64,
    /// From the block table on.
    primary: Option<Box<Primary>>,
    /// The pages of the checkpoint in hand.
    pages: PageSet,
    /// The capture that the machine waits for.
    capturing: Option<Epoch>,
    /// Bytes of device state in it, once they were sent.
    state: Option<u64>,
}

impl Feeder {
    /// A link that was just opened; every reply has to come within `patience`.
    #[must_use]
    pub fn new(now: Instant, patience: Duration) -> Self {
        Self {
            replies: Replies::new(),
            patience,
            since: now,
            checkpoints: 0,
            primary: None,
            pages: PageSet::default(),
            capturing: None,
            state: None,
        }
    }

    /// Whether the next item may be sent.
    #[must_use]
    pub fn may_send(&self) -> bool {
        !self.primary.as_ref().is_some_and(|p| p.awaits_reply())
    }

    /// Checkpoints that the secondary has applied.
    #[must_use]
    pub const fn checkpoints(&self) -> u64 {
        self.checkpoints
    }

    /// Tells that `item` went out whole. All items are told, in order.
    ///
    /// # Errors
    /// If it was not to be sent yet, or announces a machine that cannot be sent.
    pub fn handle_sent(&mut self, now: Instant, item: &Item) -> Result<(), FeedError> {
        Self::due(self.may_send(), item)?;
        self.since = now;
        if let Some(primary) = &mut self.primary {
            // It hears of pages and state when all of them are sent; that may take its time.
            primary.base.link.progressed(now);
        }
        match item {
            Item::Command(command) => {
                self.replies.expect(*command);
                Ok(())
            }
            Item::RamStart { multifd: true, .. } => Err(FeedError::Multifd),
            Item::RamStart { table, .. } => {
                self.pages = PageSet::new(&table.slots());
                self.primary = Some(machine::primary(table, Limits::default().devices, now)?);
                self.turn(now, |_| {})
            }
            Item::Page(page) => {
                self.pages.insert(page.run());
                Ok(())
            }
            Item::Devices(devices) => {
                self.state = Some(devices.bytes().len() as u64);
                Ok(())
            }
            // The last of the migration: its state is captured. Its pages went out in the round.
            Item::Description(_) => {
                self.pages.clear();
                self.captured(now, item)
            }
            Item::Message(Message::CheckpointRequest) => {
                self.turn(now, |p| {
                    let wanted = Input::Command(CommandId(0), Command::CheckpointNow);
                    never(p.handle_input(now, wanted));
                })?;
                Self::due(!self.may_send(), item)
            }
            Item::Blob(devices) => {
                self.state = Some(devices.bytes().len() as u64);
                self.captured(now, item)
            }
            _ => Ok(()),
        }
    }

    /// Takes the secondary's bytes.
    ///
    /// # Errors
    /// A reply that is not the one due, or one that nothing was sent for.
    pub fn handle_bytes(&mut self, now: Instant, mut input: &[u8]) -> Result<(), FeedError> {
        while let Some(reply) = self.replies.read(&mut input)? {
            if matches!(reply, Message::Pong(_) | Message::ReturnPathOver(_)) {
                self.since = now;
                continue;
            }
            if self.may_send() {
                return Err(FeedError::Unasked { reply });
            }
            self.since = now;
            let kind = match reply {
                Message::CheckpointReady => Kind::CheckpointReady,
                Message::CheckpointReply => Kind::CheckpointReply,
                Message::VmstateReceived => Kind::VmstateReceived,
                Message::VmstateLoaded => Kind::VmstateLoaded,
                reply => return Err(FeedError::Unasked { reply }),
            };
            self.turn(now, |p| {
                let epoch = p.transaction().unwrap_or_default();
                p.tell(now, kind, epoch.0);
            })?;
        }
        Ok(())
    }

    /// When the reply that is owed is overdue.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        (!self.may_send()).then(|| self.since + self.patience)
    }

    /// The deadline may have passed.
    ///
    /// # Errors
    /// If it has.
    pub fn handle_timeout(&self, now: Instant) -> Result<(), FeedError> {
        match self.poll_timeout() {
            Some(deadline) if now >= deadline => Err(FeedError::Silent {
                due: self.replies.due(),
                patience: self.patience,
            }),
            _ => Ok(()),
        }
    }

    /// The connection is closed or broken.
    ///
    /// # Errors
    /// If a reply was owed.
    pub fn handle_closed(&self) -> Result<(), FeedError> {
        self.replies.finish()?;
        if self.may_send() {
            return Ok(());
        }
        Err(FeedError::Closed {
            due: self.replies.due(),
        })
    }

    // ---- the translation ------------------------------------------------------------------------

    fn due(due: bool, item: &Item) -> Result<(), FeedError> {
        if due {
            return Ok(());
        }
        let item = match item {
            Item::Message(message) => message.name(),
            Item::Page(_) => "a page",
            Item::Devices(_) | Item::Blob(_) => "device state",
            Item::Description(_) => "the description",
            _ => "a section",
        };
        Err(FeedError::OutOfTurn { item })
    }

    /// All of a state was sent: that was the capture.
    fn captured(&mut self, now: Instant, item: &Item) -> Result<(), FeedError> {
        let Some((epoch, state)) = self.capturing.take().zip(self.state.take()) else {
            return Self::due(false, item);
        };
        let pages = core::mem::take(&mut self.pages);
        self.turn(now, |p| {
            for (slot, _) in pages.slots() {
                let words = pages.words(slot).unwrap_or_default();
                never(p.handle_input(now, Input::Dirty(slot, words)));
            }
            let captured = GuestDone::Captured(Captured::new(epoch, state));
            never(p.handle_input(now, Input::Guest(captured)));
        })?;
        self.pages = pages;
        self.pages.clear();
        Self::due(!self.may_send(), item)
    }

    fn turn(&mut self, now: Instant, say: impl FnOnce(&mut Primary)) -> Result<(), FeedError> {
        let Some(mut primary) = self.primary.take() else {
            return Ok(());
        };
        say(&mut primary);
        let drained = self.drain(now, &mut primary);
        self.primary = Some(primary);
        drained
    }

    /// Carries out what the machine wants, and says for the secondary what QEMU does not say: that
    /// a round has come, and every answer to the first checkpoint but the last.
    fn drain(&mut self, now: Instant, primary: &mut Primary) -> Result<(), FeedError> {
        loop {
            while let Some(output) = primary.poll_output() {
                match output {
                    Output::Guest(GuestOp::Capture { epoch, .. }) => self.capturing = Some(epoch),
                    Output::Guest(op) => never(primary.handle_input(now, Input::Guest(op.done()))),
                    // The first one is the migration.
                    Output::Event(Event::Checkpointed { epoch, .. }) => {
                        self.checkpoints = epoch.0.saturating_sub(FIRST.0);
                    }
                    output => {
                        if let Some(fault) = machine::fault(&output) {
                            return Err(FeedError::OutOfStep(fault.clone()));
                        }
                    }
                }
            }
            let sent = primary.transmitted();
            if sent.is_empty() {
                return Ok(());
            }
            for head in sent {
                let first = head.number == FIRST.0;
                match head.kind {
                    Kind::LaneEnd if head.flags & FLAG_LIVE != 0 => {
                        primary.tell(now, Kind::RoundDone, head.number);
                    }
                    Kind::CheckpointRequest if first => {
                        primary.tell(now, Kind::CheckpointReply, head.number);
                    }
                    Kind::LaneEnd if first => {
                        primary.tell(now, Kind::VmstateReceived, head.number);
                    }
                    _ => {}
                }
            }
        }
    }
}

/// The machine's number of the first checkpoint, which ends the migration.
const FIRST: Epoch = Epoch(1);
