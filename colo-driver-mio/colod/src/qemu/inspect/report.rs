//! What is known of a captured stream.

use colo_proto::qemu::{Devices, Item, Message, Reader, StreamError, Subsection};
use serde::Serialize;

/// A captured stream, in numbers.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// Version of the stream format, once its header is read.
    pub version: Option<u32>,
    /// The version of QEMU whose rules it follows, once that is certain.
    pub qemu: Option<String>,
    /// Whether pages went over multifd channels; they are not in the capture then.
    pub multifd: bool,
    /// Machine type.
    pub machine: Option<String>,
    /// Subsections of the configuration.
    pub subsections: Vec<&'static str>,
    /// Number of the RAM section.
    pub ram_section: Option<u32>,
    /// RAM blocks.
    pub blocks: Vec<Block>,
    /// The initial migration.
    pub initial: Initial,
    /// The whole checkpoints.
    pub checkpoints: Vec<Checkpoint>,
    /// Bytes understood.
    pub bytes: u64,
    /// The first fault, or where the capture is cut.
    pub fault: Option<Fault>,
    #[serde(skip)]
    open: Checkpoint,
}

/// A RAM block.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Block {
    /// Its name.
    pub name: String,
    /// Its length.
    pub bytes: u64,
}

/// The initial migration.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct Initial {
    /// RAM sections after the start.
    pub ram_sections: u64,
    /// Page records with bytes.
    pub data_pages: u64,
    /// Zero pages.
    pub zero_pages: u64,
    /// Length of the device sections.
    pub device_bytes: usize,
    /// The device sections.
    pub devices: Vec<Device>,
    /// Length of the description.
    pub description_bytes: usize,
    /// Offset behind the description; nothing if the migration is not whole.
    pub end: Option<u64>,
}

/// A device section.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Device {
    /// Its number.
    pub id: u32,
    /// The device.
    pub name: String,
    /// Which of this name.
    pub instance: u32,
    /// Version of its state.
    pub version: u32,
    /// Length of its state.
    pub bytes: usize,
}

/// A whole checkpoint.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct Checkpoint {
    /// Its number, from 1.
    pub epoch: usize,
    /// Offset of its request.
    pub offset: u64,
    /// Offset behind it.
    pub end: u64,
    /// Page records with bytes.
    pub data_pages: u64,
    /// Zero pages.
    pub zero_pages: u64,
    /// Length of the device blob.
    pub blob_bytes: usize,
    /// The device sections of the blob.
    pub devices: Vec<Device>,
}

/// The first fault of a stream.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Fault {
    /// Byte offset.
    pub offset: u64,
    /// The part of the stream.
    pub section: String,
    /// The field.
    pub field: &'static str,
    /// What is wrong.
    pub fault: String,
    /// What stood there.
    pub got: String,
    /// What may stand there.
    pub expected: String,
    /// All of it in a line.
    pub text: String,
}

impl Report {
    /// Adds an item that ends at `offset`.
    pub(super) fn add(&mut self, item: &Item, offset: u64) {
        match item {
            Item::Header => self.version = Some(colo_proto::qemu::VERSION),
            Item::Configuration(configuration) => {
                self.machine = Some(configuration.machine.to_string());
                self.subsections = configuration
                    .subsections
                    .iter()
                    .map(Subsection::name)
                    .collect();
            }
            Item::RamStart { id, table, multifd } => {
                self.multifd = *multifd;
                self.ram_section = Some(id.0);
                let block = |b: &colo_proto::qemu::Block| Block {
                    name: b.name.to_string(),
                    bytes: b.bytes,
                };
                self.blocks = table.blocks().iter().map(block).collect();
            }
            Item::RamPart(_) | Item::RamEnd(_) if self.initial.end.is_none() => {
                self.initial.ram_sections += 1;
            }
            Item::Page(page) => {
                let (data, zero) = match self.initial.end {
                    None => (&mut self.initial.data_pages, &mut self.initial.zero_pages),
                    Some(_) => (&mut self.open.data_pages, &mut self.open.zero_pages),
                };
                *(if page.zero { zero } else { data }) += 1;
            }
            Item::Devices(all) => {
                self.initial.device_bytes = all.bytes().len();
                self.initial.devices = devices(all);
            }
            Item::Description(json) => {
                self.initial.description_bytes = json.len();
                self.initial.end = Some(offset);
            }
            Item::Message(Message::CheckpointRequest) => {
                self.open = Checkpoint {
                    epoch: self.checkpoints.len() + 1,
                    offset: offset.saturating_sub(4),
                    ..Checkpoint::default()
                };
            }
            Item::Blob(blob) => {
                self.open.blob_bytes = blob.bytes().len();
                self.open.devices = devices(blob);
                self.open.end = offset;
                self.checkpoints.push(std::mem::take(&mut self.open));
            }
            _ => {}
        }
    }

    pub(super) fn end(&mut self, reader: &Reader, fault: Option<&StreamError>) {
        self.bytes = reader.offset();
        self.qemu = reader.generation().map(|g| g.to_string());
        self.fault = fault.map(|fault| Fault {
            offset: fault.offset,
            section: fault.within.to_string(),
            field: fault.field,
            fault: fault.fault.to_string(),
            got: fault.got.to_string(),
            expected: fault.expected.to_string(),
            text: fault.to_string(),
        });
    }
}

fn devices(all: &Devices) -> Vec<Device> {
    all.sections()
        .iter()
        .map(|s| Device {
            id: s.id.0,
            name: s.name.to_string(),
            instance: s.instance,
            version: s.version,
            bytes: s.payload.len(),
        })
        .collect()
}
