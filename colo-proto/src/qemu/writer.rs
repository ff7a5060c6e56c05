//! Every item back to bytes. What the reader understood comes out as it went in.

use alloc::{sync::Arc, vec::Vec};

use thiserror::Error;

use super::{
    MAGIC, VERSION,
    config::{Configuration, Subsection},
    generation::{self, Command},
    item::{BlockTable, Item, Name, PageRecord, SectionId},
    kind,
    message::Message,
    record,
};

/// Version of the RAM section.
pub(super) const RAM_VERSION: u32 = 4;

/// An item that cannot be written where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum WriteError {
    /// A page record before the block table, or of a slot that the table does not have.
    #[error("slot {slot} is not in the block table, write the start of the ram section first")]
    UnknownSlot {
        /// The slot.
        slot: u16,
    },
}

/// Encodes items in stream order.
///
/// After a [`PageRecord`] that is not zero the caller appends the page's bytes itself.
#[derive(Clone, Debug, Default)]
pub struct Writer {
    table: Option<Arc<BlockTable>>,
}

impl Writer {
    /// A writer at the start of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends `item` to `out`.
    ///
    /// # Errors
    /// A page of a slot that no block table announced; nothing is written.
    pub fn write(&mut self, item: &Item, out: &mut Vec<u8>) -> Result<(), WriteError> {
        match item {
            Item::Header => header(out),
            Item::Configuration(config) => configuration(config, out),
            Item::Command(sent) => command(*sent, out),
            Item::RamStart { id, table, multifd } => {
                ram_start(*id, table, *multifd, out);
                self.table = Some(Arc::clone(table));
            }
            Item::RamPart(id) => section(kind::PART, *id, out),
            Item::RamEnd(id) => section(kind::END, *id, out),
            Item::Page(page) => self.page(*page, out)?,
            Item::Flush => out.extend_from_slice(&record::FLUSH.to_be_bytes()),
            Item::SectionClosed(id) => close(*id, out),
            Item::LiveOver => out.push(kind::EOF),
            Item::Devices(devices) | Item::Blob(devices) => {
                out.extend_from_slice(devices.bytes());
            }
            Item::Description(json) => description(json, out),
            Item::Message(sent) => message(*sent, out),
        }
        Ok(())
    }

    fn page(&self, page: PageRecord, out: &mut Vec<u8>) -> Result<(), WriteError> {
        let block = self.table.as_ref().and_then(|t| t.block(page.slot));
        let block = block.ok_or(WriteError::UnknownSlot { slot: page.slot.0 })?;
        let name = page.named.then_some(&block.name);
        page_head(page.page, page.zero, name, out);
        Ok(())
    }
}

/// Appends a COLO message.
pub(super) fn message(message: Message, out: &mut Vec<u8>) {
    out.extend_from_slice(&message.number().to_be_bytes());
    match message {
        Message::VmstateSize(size) => out.extend_from_slice(&size.to_be_bytes()),
        Message::Pong(value) | Message::ReturnPathOver(value) => {
            out.extend_from_slice(&value.to_be_bytes());
        }
        _ => {}
    }
}

fn command(command: Command, out: &mut Vec<u8>) {
    let number = command.number();
    out.push(kind::COMMAND);
    out.extend_from_slice(&number.to_be_bytes());
    out.extend_from_slice(&generation::data_length(number).to_be_bytes());
    if let Command::Ping(value) = command {
        out.extend_from_slice(&value.to_be_bytes());
    }
}

impl Message {
    /// The message as it stands on the wire, with the size where it has one.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(12);
        message(*self, &mut out);
        out
    }
}

pub(super) fn header(out: &mut Vec<u8>) {
    out.extend_from_slice(&MAGIC.to_be_bytes());
    out.extend_from_slice(&VERSION.to_be_bytes());
}

pub(super) fn configuration(config: &Configuration, out: &mut Vec<u8>) {
    out.push(kind::CONFIGURATION);
    out.extend_from_slice(&u32::from(config.machine.len8()).to_be_bytes());
    out.extend_from_slice(config.machine.as_bytes());
    for subsection in &config.subsections {
        let name = subsection.name().as_bytes();
        out.push(kind::SUBSECTION);
        // The names are ours and short.
        out.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
        out.extend_from_slice(name);
        out.extend_from_slice(&1u32.to_be_bytes());
        match subsection {
            Subsection::PageBits(bits) => out.extend_from_slice(&bits.to_be_bytes()),
            Subsection::NoCapabilities => out.extend_from_slice(&0u32.to_be_bytes()),
            Subsection::Uuid(uuid) => out.extend_from_slice(uuid),
        }
    }
}

pub(super) fn ram_start(id: SectionId, table: &BlockTable, multifd: bool, out: &mut Vec<u8>) {
    section(kind::START, id, out);
    out.extend_from_slice(b"\x03ram");
    out.extend_from_slice(&0u32.to_be_bytes());
    out.extend_from_slice(&RAM_VERSION.to_be_bytes());
    out.extend_from_slice(&(table.bytes() | record::MEM_SIZE).to_be_bytes());
    for block in table.blocks() {
        name(&block.name, out);
        out.extend_from_slice(&block.bytes.to_be_bytes());
    }
    if multifd {
        out.extend_from_slice(&record::FLUSH.to_be_bytes());
    }
    close(id, out);
}

pub(super) fn section(kind: u8, id: SectionId, out: &mut Vec<u8>) {
    out.push(kind);
    out.extend_from_slice(&id.0.to_be_bytes());
}

/// End of the records, then the footer.
pub(super) fn close(id: SectionId, out: &mut Vec<u8>) {
    out.extend_from_slice(&record::EOS.to_be_bytes());
    section(kind::FOOTER, id, out);
}

/// The head of a page record, and the fill byte of a zero page.
pub(super) fn page_head(page: u64, zero: bool, block: Option<&Name>, out: &mut Vec<u8>) {
    let word = record::page_word(page, zero, block.is_some());
    out.extend_from_slice(&word.to_be_bytes());
    if let Some(block) = block {
        name(block, out);
    }
    if zero {
        out.push(0);
    }
}

pub(super) fn description(json: &[u8], out: &mut Vec<u8>) {
    out.push(kind::DESCRIPTION);
    // A description longer than 4 GiB cannot come from a reader.
    out.extend_from_slice(&u32::try_from(json.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(json);
}

fn name(name: &Name, out: &mut Vec<u8>) {
    out.push(name.len8());
    out.extend_from_slice(name.as_bytes());
}
