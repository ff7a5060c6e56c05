//! Whose fault is it? The driver's ([`Misuse`]), the peer's ([`PeerFault`], [`DecodeError`]) or
//! the configuration's ([`ConfigError`]).

use alloc::string::String;
use core::time::Duration;

use crate::id::{Channel, Epoch, Generation, PageRun, Slot};

/// The driver broke the contract of [`Machine`](crate::machine::Machine). Fix the driver; the
/// machine is unchanged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Misuse {
    /// Bytes, a frame or placed bytes that no demand asked for.
    #[error("{channel:?}: got {got}, but the demand was {demanded}")]
    Undemanded {
        /// Where.
        channel: Channel,
        /// What came.
        got: &'static str,
        /// What was asked for.
        demanded: &'static str,
    },
    /// A demand answered with another number of bytes.
    #[error("{channel:?}: {got} bytes, but {expected} were demanded")]
    WrongLength {
        /// Where.
        channel: Channel,
        /// Bytes given.
        got: u64,
        /// Bytes asked for.
        expected: u64,
    },
    /// More bytes reported sent than were handed out.
    #[error("{channel:?}: {got} bytes sent, but only {outstanding} were handed out")]
    SentTooMuch {
        /// Where.
        channel: Channel,
        /// Bytes reported.
        got: u64,
        /// Bytes that were in flight.
        outstanding: u64,
    },
    /// A guest operation ended that was not in progress.
    #[error("guest operation ended: {got}, in progress: {expected}")]
    UnexpectedDone {
        /// What the driver reported.
        got: &'static str,
        /// What was in progress.
        expected: &'static str,
    },
    /// A dirty log for memory that the configuration does not have.
    #[error("{0:?} is not a configured memory slot")]
    UnknownSlot(Slot),
    /// A frame stamped with an epoch that has not been captured.
    #[error("frame stamped {got:?}, but the newest capture is {newest:?}")]
    WrongEpoch {
        /// The stamp.
        got: Epoch,
        /// Newest epoch that can be stamped.
        newest: Epoch,
    },
    /// A channel that the configuration does not have.
    #[error("{0:?} is not a configured channel")]
    UnknownChannel(Channel),
    /// An input that this role has no use for.
    #[error("{what} means nothing to a {role}")]
    WrongRole {
        /// What came.
        what: &'static str,
        /// The role.
        role: &'static str,
    },
}

/// The peer broke the protocol. Never an `Err`: the machine leaves the peer, tells it, and reports
/// [`Event::PeerLeft`](crate::event::Event::PeerLeft) with this inside.
#[derive(Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum PeerFault {
    /// Bytes that are no message.
    #[error("{channel:?}: {error}")]
    Decode {
        /// Where.
        channel: Channel,
        /// What is wrong with them.
        error: DecodeError,
    },
    /// A good message at the wrong time.
    #[error("{message}: not expected while {state}")]
    OutOfPhase {
        /// The message.
        message: &'static str,
        /// What this side was doing.
        state: &'static str,
    },
    /// A field with a value that cannot be right here.
    #[error("{message}: {field} is {got}, expected {expected}")]
    Field {
        /// The message.
        message: &'static str,
        /// The field.
        field: &'static str,
        /// Its value.
        got: u64,
        /// What it had to be.
        expected: u64,
    },
    /// Something configured as bounded went over its bound.
    #[error("{message}: {field} is {got}, more than the limit of {limit}")]
    OverLimit {
        /// The message.
        message: &'static str,
        /// The field.
        field: &'static str,
        /// Its value.
        got: u64,
        /// The limit here.
        limit: u64,
    },
    /// A page outside the configured memory.
    #[error("{message}: {run:?} lies outside memory")]
    BadRun {
        /// The message.
        message: &'static str,
        /// The run.
        run: PageRun,
    },
    /// The same page twice in one epoch.
    #[error("{message}: {run:?} came twice in one epoch")]
    Repeated {
        /// The message.
        message: &'static str,
        /// The run.
        run: PageRun,
    },
    /// A message of another ownership (spec ownership 10).
    #[error("{message}: generation {got}, but this pair is at {expected}")]
    OtherGeneration {
        /// The message.
        message: &'static str,
        /// Its generation.
        got: Generation,
        /// Ours.
        expected: Generation,
    },
    /// The received device state was refused by the machine it is for.
    #[error("device state of epoch {epoch}: {why}")]
    BadState {
        /// The epoch.
        epoch: Epoch,
        /// What the guest side said.
        why: String,
    },
    /// Nothing moved for too long.
    #[error("no progress for {waited:?} while {state}")]
    Stalled {
        /// What this side was waiting for.
        state: &'static str,
        /// How long it waited.
        waited: Duration,
    },
}

/// Bytes that are no message of the native protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The first bytes of a head are not ours.
    #[error("head: magic is {got:#06x}, expected {expected:#06x}")]
    Magic {
        /// What came.
        got: u16,
        /// What every head begins with.
        expected: u16,
    },
    /// A message kind this version does not know.
    #[error("head: kind {0} is not known")]
    UnknownKind(u8),
    /// A message that has no business on this channel.
    #[error("{0} does not belong on this channel")]
    WrongChannel(&'static str),
    /// A body longer than its kind may have.
    #[error("{message}: body of {len} bytes, limit {limit}")]
    TooLong {
        /// The message.
        message: &'static str,
        /// Announced length.
        len: u64,
        /// The limit of the kind.
        limit: u64,
    },
    /// A body that ends within a field, or goes on after the last one.
    #[error("{message}: body is {len} bytes, which does not fit {field}")]
    BadLength {
        /// The message.
        message: &'static str,
        /// The field that is cut, or the last one.
        field: &'static str,
        /// Length of the body.
        len: u64,
    },
    /// A field with a value that no version uses.
    #[error("{message}: {field} is {got}, expected {expected}")]
    BadField {
        /// The message.
        message: &'static str,
        /// The field.
        field: &'static str,
        /// Its value.
        got: u64,
        /// What it may be.
        expected: &'static str,
    },
}

/// A configuration that cannot work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// No memory slot, or one without pages.
    #[error("memory: {0}")]
    Memory(&'static str),
    /// A shape item that the peer would not read as it is, and would refuse an identical host for.
    #[error("shape item {0:?}: names and values are at most 255 bytes, without control characters")]
    Shape(String),
    /// A value outside its range.
    #[error("{key} is {got}, expected {expected}")]
    Range {
        /// The setting.
        key: &'static str,
        /// Its value.
        got: u64,
        /// What it may be.
        expected: &'static str,
    },
    /// Two settings that contradict each other.
    #[error("{a} ({a_value:?}) must be at least {b} ({b_value:?})")]
    Order {
        /// The one that is too small.
        a: &'static str,
        /// Its value.
        a_value: Duration,
        /// The one it is measured against.
        b: &'static str,
        /// Its value.
        b_value: Duration,
    },
    /// Liveness and ownership settings.
    #[error(transparent)]
    Member(#[from] crate::member::ConfigError),
}
