//! A multifd channel: pages of the RAM sections on a connection of its own.
//!
//! ```text
//! init    = be32 0x11223344  be32 1  uuid  u8 channel  39 bytes
//! packet  = be32 0x11223344  be32 1  be32 flags  be32 room  be32 normal  be32 bytes  be64 number
//!           be32 zero  28 bytes  256 bytes block name  128 × be64 offset   normal × page
//! ```
//!
//! The offsets of the `normal` pages, whose bytes follow, come first, then those of the `zero`
//! ones. A packet with flag 1 marks a place: what came before it on this channel belongs before
//! the record [`Flush`](super::Item::Flush) of the same count in the main stream. The numbers of
//! the packets go on over all channels, so that one that has not come yet is missed.
//! Seen on the wire of QEMU 11.1.

use alloc::{sync::Arc, vec::Vec};
use core::num::NonZeroU32;

use super::{
    error::{Expected, Fault, Feature, Flaw, Got, StreamError, Within},
    item::{BlockTable, PageRecord},
    reader::{Demand, Overrun, Place},
};
use crate::id::{PAGE_SIZE, PageRun, Slot};

const MAGIC: u32 = 0x1122_3344;
const VERSION: u32 = 1;
const INIT: usize = 64;
/// Pages that a packet has room for.
const ROOM: usize = 128;
const HEAD: usize = 64;
const NAME: usize = 256;
const PACKET: usize = HEAD + NAME + 8 * ROOM;
/// The flag of a packet that marks a place.
const SYNC: u32 = 1;
const PAGE_BYTES: usize = PAGE_SIZE as usize;

/// What comes on a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChannelItem {
    /// The channel says which it is.
    Open(u8),
    /// A page. If it is not zero its bytes are demanded next.
    Page(PageRecord),
    /// A packet is whole; this is its number.
    Packet(u64),
    /// The packet of this number marks a place.
    Sync(u64),
}

/// Decodes a multifd channel. Page bytes never enter it. After an error it is dead.
#[derive(Clone, Debug)]
pub struct Channel {
    table: Option<Arc<BlockTable>>,
    small: Vec<u8>,
    offset: u64,
    opened: bool,
    /// Pages of the packet in hand, in reverse.
    pages: Vec<PageRecord>,
    /// The number of the packet in hand.
    packet: Option<u64>,
    place: PageRun,
    place_left: usize,
    failed: Option<StreamError>,
}

impl Default for Channel {
    fn default() -> Self {
        Self::new()
    }
}

impl Channel {
    /// The first bytes of every channel, which tell it from a main stream.
    pub const SIGN: [u8; 4] = MAGIC.to_be_bytes();

    /// A channel at its start.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            table: None,
            small: Vec::new(),
            offset: 0,
            opened: false,
            pages: Vec::new(),
            packet: None,
            place: PageRun {
                slot: Slot(0),
                first: 0,
                pages: NonZeroU32::MIN,
            },
            place_left: 0,
            failed: None,
        }
    }

    /// The RAM blocks, from the main stream. Until then no packet is demanded.
    pub fn set_table(&mut self, table: &Arc<BlockTable>) {
        self.table = Some(Arc::clone(table));
    }

    /// What the next bytes are for.
    #[must_use]
    pub fn demand(&self) -> Demand {
        let place = (self.place_left > 0).then(|| Place {
            page: self.place,
            skip: PAGE_BYTES - self.place_left,
        });
        let then = if self.failed.is_some() || place.is_some() || self.packet.is_some() {
            0
        } else if !self.opened {
            INIT - self.small.len()
        } else if self.table.is_some() {
            PACKET - self.small.len()
        } else {
            0
        };
        Demand { place, then }
    }

    /// Takes small bytes up to the next item; `None` if they do not suffice, or if page bytes are
    /// due. Call it until then, with an empty input too.
    ///
    /// # Errors
    /// What is wrong with the channel.
    pub fn handle_bytes(&mut self, input: &mut &[u8]) -> Result<Option<ChannelItem>, StreamError> {
        if let Some(failed) = &self.failed {
            return Err(failed.clone());
        }
        if self.place_left > 0 {
            return Ok(None);
        }
        if let Some(record) = self.pages.pop() {
            if !record.zero {
                (self.place, self.place_left) = (record.run(), PAGE_BYTES);
            }
            return Ok(Some(ChannelItem::Page(record)));
        }
        if let Some(number) = self.packet.take() {
            return Ok(Some(ChannelItem::Packet(number)));
        }
        let demand = self.demand().then;
        let n = input.len().min(demand);
        let (now, rest) = input.split_at(n);
        *input = rest;
        self.small.extend_from_slice(now);
        if demand == 0 || n < demand {
            return Ok(None);
        }
        let small = core::mem::take(&mut self.small);
        let taken = if self.opened {
            self.packet(&small)
        } else {
            self.init(&small)
        };
        let base = self.offset;
        self.offset += small.len() as u64;
        taken
            .map_err(|flaw| {
                let error = flaw.within(Within::Channel, base);
                self.failed = Some(error.clone());
                error
            })
            .and_then(|item| match item {
                Some(item) => Ok(Some(item)),
                None => self.handle_bytes(input),
            })
    }

    /// Tells that `n` bytes of the demanded page were placed.
    ///
    /// # Errors
    /// If that is more than were due; nothing changes then.
    pub fn handle_placed(&mut self, n: usize) -> Result<(), Overrun> {
        if n > self.place_left {
            return Err(Overrun {
                placed: n,
                due: self.place_left,
            });
        }
        self.place_left -= n;
        self.offset += n as u64;
        Ok(())
    }

    fn init(&mut self, bytes: &[u8]) -> Result<Option<ChannelItem>, Flaw> {
        signed(bytes)?;
        self.opened = true;
        let channel = bytes.get(24).copied().unwrap_or_default();
        Ok(Some(ChannelItem::Open(channel)))
    }

    fn packet(&mut self, bytes: &[u8]) -> Result<Option<ChannelItem>, Flaw> {
        signed(bytes)?;
        let (flags, room, normal) = (word(bytes, 8), word(bytes, 12), word(bytes, 16));
        let (length, number, zero) = (word(bytes, 20), long(bytes, 24), word(bytes, 32));
        if flags & !SYNC != 0 {
            return Err(Flaw::new(
                8,
                "packet flags",
                Fault::Unsupported(Feature::MultifdCompression),
                flags,
                "0, or 1 for a mark",
            ));
        }
        let over = |at, field, got: u32, most: u32| {
            let expected = Expected::AtMost(most.into());
            Flaw::new(at, field, Fault::OverLimit, got, expected)
        };
        // Room for this many always comes, so that the length of a packet never changes.
        let most = ROOM as u32;
        if room > most {
            return Err(over(12, "room for pages", room, most));
        }
        if normal > room {
            return Err(over(16, "normal pages", normal, room));
        }
        if zero > room - normal {
            return Err(over(32, "zero pages", zero, room - normal));
        }
        if u64::from(length) != u64::from(normal) * PAGE_SIZE {
            return Err(Flaw::new(
                20,
                "bytes of pages",
                Fault::Mismatch,
                length,
                u64::from(normal) * PAGE_SIZE,
            ));
        }
        if flags & SYNC != 0 {
            if normal + zero > 0 {
                let got = normal + zero;
                return Err(Flaw::new(
                    16,
                    "pages",
                    Fault::OutOfPlace,
                    got,
                    "none with a mark",
                ));
            }
            return Ok(Some(ChannelItem::Sync(number)));
        }
        self.packet = Some(number);
        if normal + zero > 0 {
            self.announced(bytes, normal as usize, (normal + zero) as usize)?;
        }
        Ok(None)
    }

    /// Takes note of the pages that a packet announces.
    fn announced(&mut self, bytes: &[u8], normal: usize, all: usize) -> Result<(), Flaw> {
        let name = bytes.get(HEAD..HEAD + NAME).unwrap_or_default();
        let name = name.split(|b| *b == 0).next().unwrap_or_default();
        let table = self.table.as_deref();
        let found = table.and_then(|t| t.slot(name).and_then(|slot| Some((slot, t.block(slot)?))));
        let Some((slot, block)) = found else {
            let expected = Expected::Text(table.map(BlockTable::names).unwrap_or_default().into());
            let got = Got::name(name);
            return Err(Flaw::new(HEAD, "block name", Fault::Unknown, got, expected));
        };
        for at in (0..all).rev() {
            let place = HEAD + NAME + 8 * at;
            let offset = long(bytes, place);
            if !offset.is_multiple_of(PAGE_SIZE) || offset >= block.bytes {
                let expected = Expected::Below(block.bytes);
                return Err(Flaw::new(
                    place,
                    "page offset",
                    Fault::OverLimit,
                    offset,
                    expected,
                ));
            }
            self.pages.push(PageRecord {
                slot,
                page: offset / PAGE_SIZE,
                zero: at >= normal,
                named: false,
            });
        }
        Ok(())
    }
}

fn signed(bytes: &[u8]) -> Result<(), Flaw> {
    let (magic, version) = (word(bytes, 0), word(bytes, 4));
    if magic != MAGIC {
        return Err(Flaw::new(0, "magic", Fault::Mismatch, magic, MAGIC));
    }
    if version != VERSION {
        return Err(Flaw::new(4, "version", Fault::Unknown, version, VERSION));
    }
    Ok(())
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(at..).and_then(<[u8]>::first_chunk);
    word.map_or(0, |word| u32::from_be_bytes(*word))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    let long = bytes.get(at..).and_then(<[u8]>::first_chunk);
    long.map_or(0, |long| u64::from_be_bytes(*long))
}
