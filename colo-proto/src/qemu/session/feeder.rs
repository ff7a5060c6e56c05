//! The primary's role with a recording behind it: what may be sent when.

use core::time::Duration;

use thiserror::Error;

use super::super::{
    error::StreamError,
    item::Item,
    message::{Message, Replies},
};
use crate::time::Instant;

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
}

/// The primary's role: items go out as long as no reply is owed.
#[derive(Clone, Debug)]
pub struct Feeder {
    replies: Replies,
    owed: u32,
    patience: Duration,
    since: Instant,
    checkpoints: u64,
}

impl Feeder {
    /// A link that was just opened; every reply has to come within `patience`.
    #[must_use]
    pub fn new(now: Instant, patience: Duration) -> Self {
        Self {
            replies: Replies::new(),
            owed: 0,
            patience,
            since: now,
            checkpoints: 0,
        }
    }

    /// Whether the next item may be sent.
    #[must_use]
    pub const fn may_send(&self) -> bool {
        self.owed == 0
    }

    /// Checkpoints that the secondary has applied.
    #[must_use]
    pub const fn checkpoints(&self) -> u64 {
        self.checkpoints
    }

    /// Tells that `item` went out whole.
    pub fn handle_sent(&mut self, now: Instant, item: &Item) {
        self.owed += match item {
            // The initial state, then REQUEST: one reply each. A checkpoint: RECEIVED, LOADED.
            Item::Description(_) | Item::Message(Message::CheckpointRequest) => 1,
            Item::Blob(_) => 2,
            _ => 0,
        };
        self.since = now;
    }

    /// Takes the secondary's bytes.
    ///
    /// # Errors
    /// A reply that is not the one due, or one that nothing was sent for.
    pub fn handle_bytes(&mut self, now: Instant, mut input: &[u8]) -> Result<(), FeedError> {
        while let Some(reply) = self.replies.read(&mut input)? {
            self.owed = self
                .owed
                .checked_sub(1)
                .ok_or(FeedError::Unasked { reply })?;
            self.since = now;
            self.checkpoints += u64::from(reply == Message::VmstateLoaded);
        }
        Ok(())
    }

    /// When the reply that is owed is overdue.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        (self.owed > 0).then(|| self.since + self.patience)
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
        if self.owed == 0 {
            return Ok(());
        }
        Err(FeedError::Closed {
            due: self.replies.due(),
        })
    }
}
