//! Speaking QEMU's dialect: the migration stream and the COLO messages of QEMU 7.2, byte for byte.
//!
//! ```text
//!  socket or file ──bytes──▶ Reader ──Item──▶ whoever keeps the checkpoint
//!                    │         ▲
//!                    │         └ Demand: how many small bytes next, and where a page's bytes go
//!                    └─page bytes──▶ memory (they never enter this module)
//!
//!  Item ──▶ Writer ──bytes──▶ the identical stream
//!  initial state + newest blob + pages ──▶ Resume ──▶ a stream that `-incoming` loads
//! ```
//!
//! * [`Reader`]: incremental decoder of the primary's side, at any split of the input.
//! * [`Writer`]: every item back to bytes.
//! * [`Message`]: the seven COLO messages, both ways; [`Replies`] reads the secondary's side.
//! * [`Devices`]: device sections, opaque, with the boundaries found (spec qemu 13).
//! * [`Resume`]: a checkpoint as an ordinary migration stream (spec qemu 14).
//! * [`session`]: both roles towards an unmodified QEMU.
//! * [`StreamError`]: offset, section, field, got, expected.
//!
//! What the dialect cannot speak is refused by name: [`Feature`]. Every length has a bound:
//! [`Limits`].

mod channel;
mod config;
mod description;
mod device;
mod error;
mod generation;
mod item;
mod limits;
mod message;
mod name;
mod reader;
mod record;
mod resume;
mod section;
pub mod session;
mod writer;

#[cfg(any(test, fuzzing))]
pub mod fuzzing;

pub use channel::{Channel, ChannelItem};
pub use config::{Configuration, Subsection};
pub use description::{Described, DescriptionError, describe};
pub use device::{DeviceSection, Devices};
pub use error::{Expected, Fault, Feature, Got, StreamError, Within};
pub use generation::{Command, Generation};
pub use item::{Block, BlockTable, Item, Name, PageRecord, SectionId};
pub use limits::{Expectation, Limits};
pub use message::{Message, Replies};
pub use reader::{Demand, Overrun, Place, Reader};
pub use resume::{Resume, Segment};
pub use writer::{WriteError, Writer};

/// Magic of the stream, `QEVM`.
pub const MAGIC: u32 = 0x5145_564D;
/// Version of the stream.
pub const VERSION: u32 = 3;

/// Item types (spec qemu 2).
mod kind {
    pub(super) const EOF: u8 = 0x00;
    pub(super) const START: u8 = 0x01;
    pub(super) const PART: u8 = 0x02;
    pub(super) const END: u8 = 0x03;
    pub(super) const FULL: u8 = 0x04;
    pub(super) const SUBSECTION: u8 = 0x05;
    pub(super) const DESCRIPTION: u8 = 0x06;
    pub(super) const CONFIGURATION: u8 = 0x07;
    pub(super) const COMMAND: u8 = 0x08;
    pub(super) const FOOTER: u8 = 0x7E;
}
