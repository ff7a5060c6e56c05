//! The items of the stream as values. Page bytes are named, never held.

use alloc::sync::Arc;
use core::num::NonZeroU32;

use bytes::Bytes;

use super::{config::Configuration, device::Devices, generation::Command, message::Message};
pub use super::{
    name::{Block, BlockTable, Name},
    section::SectionId,
};
use crate::id::{PageRun, Slot};

/// A page record of a RAM section.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRecord {
    /// The block.
    pub slot: Slot,
    /// The page within the block.
    pub page: u64,
    /// Whether it is all zero; otherwise its bytes follow.
    pub zero: bool,
    /// Whether the record names its block (else it continues in the last one named).
    pub named: bool,
}

impl PageRecord {
    /// The page as a run of one.
    #[must_use]
    pub const fn run(&self) -> PageRun {
        PageRun {
            slot: self.slot,
            first: self.page,
            pages: NonZeroU32::MIN,
        }
    }
}

/// One item of the primary's side of a link, in stream order.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Item {
    /// The magic and the version.
    Header,
    /// The machine and its subsections.
    Configuration(Arc<Configuration>),
    /// A command: before the RAM section, or before its end.
    Command(Command),
    /// The start section of the RAM, whole.
    RamStart {
        /// Its number in all later sections.
        id: SectionId,
        /// The blocks.
        table: Arc<BlockTable>,
        /// Whether pages come on multifd channels.
        multifd: bool,
    },
    /// A RAM section of the initial migration opens.
    RamPart(SectionId),
    /// The last RAM section of the initial migration or the live part of a checkpoint opens.
    RamEnd(SectionId),
    /// A page. If it is not zero, its bytes follow and go past the reader.
    Page(PageRecord),
    /// What the multifd channels carried up to here belongs before what follows.
    Flush,
    /// The open RAM section is closed.
    SectionClosed(SectionId),
    /// The live part of a checkpoint is over.
    LiveOver,
    /// The device sections of the initial migration with their end mark.
    Devices(Devices),
    /// The description of the device sections, JSON. The initial state is whole.
    Description(Bytes),
    /// A COLO message.
    Message(Message),
    /// The device sections of a checkpoint with their end mark, validated: the checkpoint is
    /// whole.
    Blob(Devices),
}
