//! What was wrong with a stream: where, in what, which field, what it was, what it should have been.

use alloc::{borrow::Cow, boxed::Box, string::String};
use core::fmt;

use thiserror::Error;

use super::item::SectionId;

/// A stream that is refused. The reader is dead after it: the dialect has no resynchronisation
/// (spec qemu 1).
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("byte {offset}, {within}, {field}: {fault}: got {got}, expected {expected}")]
#[non_exhaustive]
pub struct StreamError {
    /// Byte offset of the field, from the start of the stream.
    pub offset: u64,
    /// The part of the stream.
    pub within: Within,
    /// The field.
    pub field: &'static str,
    /// What kind of fault it is.
    pub fault: Fault,
    /// What stood there.
    pub got: Got,
    /// What may stand there.
    pub expected: Expected,
}

/// The part of the stream in which a fault lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Within {
    /// The 8 bytes at the start.
    Header,
    /// The configuration section.
    Configuration,
    /// A command.
    Command,
    /// The section that announces the RAM blocks.
    RamStart,
    /// A RAM section of the initial migration.
    Ram,
    /// The device sections of the initial migration.
    Devices,
    /// The description of the device sections.
    Description,
    /// Between checkpoints.
    Message,
    /// The RAM section of a checkpoint.
    Live,
    /// The device sections of a checkpoint.
    Blob,
    /// One device section of a checkpoint or of the initial migration.
    Device(SectionId),
    /// The secondary's side of the link.
    Replies,
    /// A multifd channel.
    Channel,
}

impl fmt::Display for Within {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header => f.write_str("header"),
            Self::Configuration => f.write_str("configuration section"),
            Self::Command => f.write_str("command"),
            Self::RamStart => f.write_str("start of the ram section"),
            Self::Ram => f.write_str("ram section"),
            Self::Devices => f.write_str("device sections"),
            Self::Description => f.write_str("description"),
            Self::Message => f.write_str("message"),
            Self::Live => f.write_str("live part of a checkpoint"),
            Self::Blob => f.write_str("device blob of a checkpoint"),
            Self::Device(id) => write!(f, "device section {id}"),
            Self::Replies => f.write_str("reply"),
            Self::Channel => f.write_str("multifd channel"),
        }
    }
}

/// The kind of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum Fault {
    /// The stream ends inside an item.
    #[error("the stream is cut")]
    Truncated,
    /// The sender uses what this dialect cannot speak; switch it off on the primary.
    #[error("{0} cannot be spoken, switch it off at the sender")]
    Unsupported(Feature),
    /// A length or a count beyond its limit.
    #[error("beyond the limit")]
    OverLimit,
    /// Known, but not legal here.
    #[error("not legal here")]
    OutOfPlace,
    /// Nothing by this name or number.
    #[error("unknown")]
    Unknown,
    /// Differs from what this side has.
    #[error("does not match")]
    Mismatch,
    /// What may stand only once.
    #[error("repeated")]
    Repeated,
    /// What must be there is not.
    #[error("missing")]
    Missing,
    /// Legal in another version of QEMU, not in the one that the rest of the stream is of.
    #[error("mixes what different versions of QEMU send")]
    Mixture,
    /// Breaks the format.
    #[error("malformed")]
    Malformed,
}

/// Something of QEMU's that the dialect refuses by name (spec qemu 9).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum Feature {
    /// Delta-coded pages; loses updates with COLO (spec qemu B1).
    #[error("xbzrle")]
    Xbzrle,
    /// Compressed pages; crashes QEMU's secondary (spec qemu B2).
    #[error("compress")]
    Compress,
    /// Compressed pages on multifd channels.
    #[error("multifd-compression")]
    MultifdCompression,
    /// Pages on channels of their own (spec qemu B3).
    #[error("multifd")]
    Multifd,
    /// The obsolete whole-RAM record.
    #[error("the obsolete full-ram record")]
    FullRam,
    /// Records of another transport.
    #[error("rdma")]
    Rdma,
    /// Messages back before the migration ends, of a QEMU before 11 (spec qemu B4).
    #[error("return-path")]
    ReturnPath,
    /// The guest runs before its memory is there.
    #[error("postcopy-ram")]
    Postcopy,
    /// Bitmaps of disks in the stream.
    #[error("dirty-bitmaps")]
    DirtyBitmaps,
    /// Disks in the stream.
    #[error("block migration")]
    BlockMigration,
    /// A stream within the stream.
    #[error("packaged commands")]
    Packaged,
    /// Shared memory that is not sent.
    #[error("x-ignore-shared")]
    IgnoreShared,
}

/// What stood in the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Got {
    /// A number.
    Number(u64),
    /// A name.
    Name(Box<str>),
    /// A fixed text.
    Text(&'static str),
    /// The end of the stream after this many bytes of the item.
    EndAfter(u64),
}

impl fmt::Display for Got {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(n) => write!(f, "{n} ({n:#x})"),
            Self::Name(name) => write!(f, "`{name}`"),
            Self::Text(text) => f.write_str(text),
            Self::EndAfter(n) => write!(f, "the end after {n} bytes"),
        }
    }
}

/// What may stand there.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Expected {
    /// This number.
    Number(u64),
    /// This much or less.
    AtMost(u64),
    /// Less than this.
    Below(u64),
    /// This name.
    Name(Box<str>),
    /// One of these, in words.
    Text(Cow<'static, str>),
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(n) => write!(f, "{n} ({n:#x})"),
            Self::AtMost(n) => write!(f, "at most {n}"),
            Self::Below(n) => write!(f, "less than {n}"),
            Self::Name(name) => write!(f, "`{name}`"),
            Self::Text(text) => f.write_str(text),
        }
    }
}

impl From<u64> for Got {
    fn from(n: u64) -> Self {
        Self::Number(n)
    }
}

impl From<u32> for Got {
    fn from(n: u32) -> Self {
        Self::Number(n.into())
    }
}

impl From<u8> for Got {
    fn from(n: u8) -> Self {
        Self::Number(n.into())
    }
}

impl From<usize> for Got {
    fn from(n: usize) -> Self {
        Self::Number(n as u64)
    }
}

impl From<&'static str> for Got {
    fn from(text: &'static str) -> Self {
        Self::Text(text)
    }
}

impl Got {
    /// A name from the peer, made printable.
    pub(super) fn name(bytes: &[u8]) -> Self {
        let text: String = bytes
            .iter()
            .take(255)
            .flat_map(|&b| core::ascii::escape_default(b).map(char::from))
            .collect();
        Self::Name(text.into())
    }
}

impl From<&'static str> for Expected {
    fn from(text: &'static str) -> Self {
        Self::Text(Cow::Borrowed(text))
    }
}

impl From<u32> for Expected {
    fn from(n: u32) -> Self {
        Self::Number(n.into())
    }
}

impl From<u64> for Expected {
    fn from(n: u64) -> Self {
        Self::Number(n)
    }
}

/// A fault whose offset is still relative to the bytes at hand: the reader adds the rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Flaw {
    pub(super) at: usize,
    /// What it is relative to, if not to the bytes at hand.
    pub(super) base: Option<u64>,
    pub(super) field: &'static str,
    pub(super) fault: Fault,
    pub(super) got: Got,
    pub(super) expected: Expected,
}

impl Flaw {
    pub(super) fn new(
        at: usize,
        field: &'static str,
        fault: Fault,
        got: impl Into<Got>,
        expected: impl Into<Expected>,
    ) -> Self {
        Self {
            at,
            base: None,
            field,
            fault,
            got: got.into(),
            expected: expected.into(),
        }
    }

    /// Relative to `base` instead of the bytes at hand.
    pub(super) fn based(self, base: u64) -> Self {
        Self {
            base: Some(base),
            ..self
        }
    }

    pub(super) fn within(self, within: Within, base: u64) -> StreamError {
        StreamError {
            offset: self.base.unwrap_or(base).saturating_add(self.at as u64),
            within,
            field: self.field,
            fault: self.fault,
            got: self.got,
            expected: self.expected,
        }
    }
}
