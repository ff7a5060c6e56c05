//! What the reader waits for. Every step knows its length before a byte of it is taken.

use super::super::{config::Coming, error::Within};

/// The next small item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Magic and version.
    Header,
    /// Type and name length of the configuration.
    ConfigHead,
    Machine(usize),
    /// Type of the next item before the RAM section.
    PreambleType,
    SubLen,
    /// Name and version of a subsection.
    SubName(usize),
    SubBody(Coming),
    CapabilityLen,
    Capability(usize),
    /// Number and length of a command.
    Command,
    /// The data of a command.
    CommandData(u16),
    /// Id and name length of the section that starts.
    StartHead,
    /// Its name, instance and version.
    StartName(usize),
    /// The word that announces the block table.
    TableHead,
    BlockLen,
    /// Name and length of a block.
    Block(usize),
    /// The end of records after the table.
    TableEnd,
    /// Type of the next RAM section.
    RamType,
    /// Its id.
    RamId(u8),
    Record,
    NameLen(Coded),
    BlockName(Coded, usize),
    /// The fill byte of a zero page; whether the record named its block.
    Fill(Coded),
    Footer,
    /// Device sections and description of the initial migration.
    Devices,
    Message(Turn),
    LiveType,
    /// Number and length of a command before the RAM of a checkpoint.
    LiveCommand,
    LiveId,
    LiveEnd,
    Size,
    Blob(usize),
}

/// A page record whose head is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Coded {
    pub(super) page: u64,
    pub(super) zero: bool,
    pub(super) named: bool,
}

/// Which message is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    Request,
    Send,
    Size,
}

impl Step {
    /// How many bytes make it whole. Steps of unknown length are handled apart.
    #[inline]
    pub(super) const fn need(self) -> usize {
        match self {
            Self::Header | Self::TableHead | Self::TableEnd | Self::Record | Self::Size => 8,
            Self::ConfigHead | Self::StartHead | Self::Footer => 5,
            Self::Command
            | Self::CommandData(_)
            | Self::LiveCommand
            | Self::RamId(_)
            | Self::Message(_)
            | Self::LiveId => 4,
            Self::PreambleType
            | Self::SubLen
            | Self::CapabilityLen
            | Self::BlockLen
            | Self::RamType
            | Self::NameLen(_)
            | Self::Fill(_)
            | Self::LiveType
            | Self::LiveEnd => 1,
            Self::Machine(n) | Self::Capability(n) | Self::BlockName(_, n) => n,
            Self::SubName(n) => n + 4,
            Self::StartName(n) | Self::Block(n) => n + 8,
            Self::SubBody(coming) => coming.body(),
            Self::Devices | Self::Blob(_) => 0,
        }
    }

    /// What it is called in an error.
    pub(super) const fn field(self) -> &'static str {
        match self {
            Self::Header => "magic and version",
            Self::ConfigHead => "configuration",
            Self::Machine(_) => "machine name",
            Self::PreambleType | Self::RamType | Self::LiveType => "section type",
            Self::SubLen | Self::SubName(_) => "subsection name",
            Self::SubBody(_) => "subsection",
            Self::CapabilityLen | Self::Capability(_) => "capability",
            Self::Command | Self::LiveCommand => "command",
            Self::CommandData(_) => "data of a command",
            Self::StartHead | Self::StartName(_) => "section name",
            Self::TableHead => "block table",
            Self::BlockLen | Self::Block(_) => "block",
            Self::TableEnd => "end of the block table",
            Self::RamId(_) | Self::LiveId => "section id",
            Self::Record => "record",
            Self::NameLen(_) | Self::BlockName(..) => "block name",
            Self::Fill(_) => "fill byte",
            Self::Footer => "footer",
            Self::Devices => "device sections",
            Self::Message(_) => "message",
            Self::LiveEnd => "end mark",
            Self::Size => "size",
            Self::Blob(_) => "blob",
        }
    }

    /// The part of the stream it belongs to. Records do not know whose they are.
    pub(super) const fn within(self, live: bool, before_table: bool) -> Within {
        match self {
            Self::Header => Within::Header,
            Self::ConfigHead
            | Self::Machine(_)
            | Self::SubLen
            | Self::SubName(_)
            | Self::SubBody(_)
            | Self::CapabilityLen
            | Self::Capability(_) => Within::Configuration,
            Self::PreambleType | Self::Command | Self::CommandData(_) => Within::Command,
            Self::StartHead
            | Self::StartName(_)
            | Self::TableHead
            | Self::BlockLen
            | Self::Block(_)
            | Self::TableEnd => Within::RamStart,
            Self::RamType
            | Self::RamId(_)
            | Self::Record
            | Self::NameLen(_)
            | Self::BlockName(..)
            | Self::Fill(_)
            | Self::Footer => match (live, before_table) {
                (true, _) => Within::Live,
                (false, true) => Within::RamStart,
                (false, false) => Within::Ram,
            },
            Self::Devices => Within::Devices,
            Self::Message(_) | Self::Size => Within::Message,
            Self::LiveType | Self::LiveCommand | Self::LiveId | Self::LiveEnd => Within::Live,
            Self::Blob(_) => Within::Blob,
        }
    }
}
