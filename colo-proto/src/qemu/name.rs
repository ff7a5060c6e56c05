//! Names on the wire, and the RAM blocks that bear them.

use alloc::{string::String, sync::Arc, vec::Vec};
use core::fmt;

use super::error::{Fault, Flaw, Got};
use crate::id::{PAGE_SIZE, Slot};

/// A name on the wire: 1 to 255 printable ASCII characters.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Arc<str>);

impl Name {
    /// A name, if `bytes` are one.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let fits = (1..=255).contains(&bytes.len());
        let printable = bytes.iter().all(|b| (0x20..0x7F).contains(b));
        let text = core::str::from_utf8(bytes).ok()?;
        (fits && printable).then(|| Self(text.into()))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The bytes as they stand on the wire, without the length.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// Length for a `str8`; a name is never longer than 255.
    pub(super) fn len8(&self) -> u8 {
        u8::try_from(self.0.len()).unwrap_or(u8::MAX)
    }

    pub(super) fn parse(bytes: &[u8], field: &'static str) -> Result<Self, Flaw> {
        Self::new(bytes).ok_or_else(|| {
            Flaw::new(
                0,
                field,
                Fault::Malformed,
                Got::name(bytes),
                "1 to 255 printable ASCII characters",
            )
        })
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One RAM block of the sender.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Block {
    /// Its name, unique in the table.
    pub name: Name,
    /// Its length in bytes, a multiple of the page size, never zero.
    pub bytes: u64,
}

impl Block {
    /// Its length in pages.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.bytes / PAGE_SIZE
    }
}

/// The RAM blocks in the sender's order. A block's place in the table is its [`Slot`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct BlockTable(pub(super) Vec<Block>);

impl BlockTable {
    /// The blocks.
    #[must_use]
    pub fn blocks(&self) -> &[Block] {
        &self.0
    }

    /// All blocks together, in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0
            .iter()
            .fold(0, |sum: u64, b| sum.saturating_add(b.bytes))
    }

    /// The block of a slot.
    #[must_use]
    pub fn block(&self, slot: Slot) -> Option<&Block> {
        self.0.get(usize::from(slot.0))
    }

    /// The slot of the block of this name.
    #[must_use]
    pub fn slot(&self, name: &[u8]) -> Option<Slot> {
        let at = self.0.iter().position(|b| b.name.as_bytes() == name)?;
        u16::try_from(at).ok().map(Slot)
    }

    /// Slots with their sizes in pages, as a page set wants them.
    #[must_use]
    pub fn slots(&self) -> Vec<(Slot, u64)> {
        (0..)
            .map(Slot)
            .zip(self.0.iter().map(Block::pages))
            .collect()
    }

    /// The names, for a message.
    pub(super) fn names(&self) -> String {
        let mut text = String::new();
        for block in &self.0 {
            if !text.is_empty() {
                text.push_str(", ");
            }
            text.push_str(block.name.as_str());
        }
        text
    }
}
