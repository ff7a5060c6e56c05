//! Incremental decoder of the primary's side of a link.
//!
//! * `step.rs`: what the reader waits for, how many bytes that takes and what it is called.
//! * `initial.rs`: header to description; `table.rs`: RAM blocks; `ram.rs`: records; `colo.rs`: checkpoints.
//! * `scan.rs`: finds the end of the initial device sections.

mod colo;
mod initial;
mod ram;
mod scan;
mod step;
mod table;

use alloc::{sync::Arc, vec::Vec};

use thiserror::Error;

use self::{
    scan::Scan,
    step::{Step, Turn},
};
use super::{
    config::Subsection,
    device::Known,
    error::{Expected, Fault, Flaw, Got, StreamError, Within},
    generation::{Chooser, Generation},
    item::{Block, BlockTable, Item, Name, SectionId},
    limits::{Expectation, Limits},
};
use crate::{
    id::{PAGE_SIZE, PageRun, Slot},
    ram::PageSet,
};

/// How many bytes are asked for at once where the length is not known: the initial device
/// sections.
const CHUNK: usize = 64 << 10;

/// What the next bytes of the stream are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    /// The bytes of a page that come first, if any: report them with
    /// [`Reader::handle_placed`].
    pub place: Option<Place>,
    /// How many bytes after those may be given to [`Reader::handle_bytes`]. Never past the item
    /// in hand, except in the initial device sections, whose length is not known: there the
    /// reader may leave some untaken.
    pub then: usize,
}

/// Where the bytes of a page go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The page; its slot is its block's place in the [`BlockTable`].
    pub page: PageRun,
    /// How many of its bytes came already.
    pub skip: usize,
}

/// More bytes were reported as placed than were demanded: the driver is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{placed} page bytes were placed and {due} were due")]
#[non_exhaustive]
pub struct Overrun {
    /// Bytes reported.
    pub placed: usize,
    /// Bytes of the page that were still missing.
    pub due: usize,
}

/// Decodes the primary's side of a link, byte by byte if need be. Page bytes never enter it.
///
/// ```
/// use colo_proto::qemu::{Expectation, Item, Limits, Reader};
///
/// let mut reader = Reader::new(Limits::default(), Expectation::default());
/// let mut input = &b"QEVM\0\0\0\x03\x07\0\0"[..];
/// assert_eq!(reader.handle_bytes(&mut input)?, Some(Item::Header));
/// assert_eq!(reader.handle_bytes(&mut input)?, None);
/// assert_eq!(reader.demand().then, 2); // the rest of the configuration's length
/// # Ok::<(), colo_proto::qemu::StreamError>(())
/// ```
///
/// After an error it is dead and repeats the error.
#[derive(Clone, Debug)]
pub struct Reader {
    limits: Limits,
    expect: Expectation,
    /// Bytes of whole items taken, page bytes included.
    offset: u64,
    step: Step,
    /// The beginning of an item that came in pieces.
    small: Vec<u8>,
    /// The page whose bytes are due, and how many.
    page: PageRun,
    page_left: usize,
    /// An item that came together with the last one.
    queued: Option<Item>,
    failed: Option<StreamError>,
    preamble: Preamble,
    rules: Chooser,
    ram: Ram,
    devices: Scan,
    known: Vec<Known>,
    blob: Vec<u8>,
}

/// What comes before the RAM section.
#[derive(Clone, Debug, Default)]
struct Preamble {
    machine: Option<Name>,
    subsections: Vec<Subsection>,
}

/// The RAM section's state, across sections and checkpoints.
#[derive(Clone, Debug)]
struct Ram {
    id: SectionId,
    /// The open section.
    section: Open,
    /// Whether the block table began: of the commands only the end's announcement is legal after
    /// it.
    started: bool,
    /// Whether pages come on multifd channels.
    multifd: bool,
    /// Whether the last record waited for those channels.
    flushed: bool,
    /// Grows while the table is read.
    blocks: Vec<Block>,
    /// Bytes of the announced total that no block has claimed yet.
    unclaimed: u64,
    table: Arc<BlockTable>,
    /// The last named block and its pages: records with CONTINUE go on in it, also in the next
    /// section and the next checkpoint.
    current: Option<(Slot, u64)>,
    /// Offset of the record in hand.
    record_at: u64,
    /// Whether a checkpoint's section is read: each page may stand in it once.
    live: bool,
    seen: PageSet,
}

/// Which RAM section is open, or was last: it says what follows its footer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Open {
    /// The start section with the block table.
    Start,
    /// A part of the initial migration's RAM.
    Part,
    /// The end of the initial migration's RAM.
    End,
    /// The live part of a checkpoint.
    Live,
}

impl Reader {
    /// A reader at the start of a stream.
    #[must_use]
    pub fn new(limits: Limits, expect: Expectation) -> Self {
        Self {
            limits,
            expect,
            offset: 0,
            step: Step::Header,
            small: Vec::new(),
            page: PageRun {
                slot: Slot(0),
                first: 0,
                pages: core::num::NonZeroU32::MIN,
            },
            page_left: 0,
            queued: None,
            failed: None,
            preamble: Preamble::default(),
            rules: Chooser::default(),
            ram: Ram {
                id: SectionId(0),
                section: Open::Start,
                started: false,
                multifd: false,
                flushed: false,
                blocks: Vec::new(),
                unclaimed: 0,
                table: Arc::default(),
                current: None,
                record_at: 0,
                live: false,
                seen: PageSet::default(),
            },
            devices: Scan::default(),
            known: Vec::new(),
            blob: Vec::new(),
        }
    }

    /// What the next bytes are for. `then` is 0 after an error only.
    #[must_use]
    pub fn demand(&self) -> Demand {
        if self.failed.is_some() {
            return Demand {
                place: None,
                then: 0,
            };
        }
        if self.page_left > 0 {
            return Demand {
                place: Some(Place {
                    page: self.page,
                    skip: PAGE_BYTES - self.page_left,
                }),
                // The head of the next record.
                then: 8,
            };
        }
        let then = match self.step {
            Step::Devices => CHUNK,
            Step::Blob(size) => size.saturating_sub(self.blob.len()),
            step => step.need().saturating_sub(self.small.len()),
        };
        Demand { place: None, then }
    }

    /// Takes small bytes off `input` up to the end of the next item. `None` if they do not
    /// suffice, or if page bytes are due first. Call it until then: one call may complete two
    /// items.
    ///
    /// # Errors
    /// What is wrong with the stream. The reader is dead after it.
    pub fn handle_bytes(&mut self, input: &mut &[u8]) -> Result<Option<Item>, StreamError> {
        if let Some(failed) = &self.failed {
            return Err(failed.clone());
        }
        if self.queued.is_some() {
            return Ok(self.queued.take());
        }
        let read = self.advance(input);
        if let Err(error) = &read {
            self.failed = Some(error.clone());
        }
        read
    }

    /// Tells that `n` bytes of the demanded page were placed.
    ///
    /// # Errors
    /// If that is more than were due; nothing changes then.
    pub fn handle_placed(&mut self, n: usize) -> Result<(), Overrun> {
        if n > self.page_left {
            return Err(Overrun {
                placed: n,
                due: self.page_left,
            });
        }
        self.page_left -= n;
        self.offset += n as u64;
        Ok(())
    }

    /// [`handle_bytes`](Self::handle_bytes) over a stream that lies in memory: page bytes are
    /// skipped, not looked at. After an [`Item::Page`] that is not zero, its bytes start at
    /// [`offset`](Self::offset).
    ///
    /// # Errors
    /// As [`handle_bytes`](Self::handle_bytes).
    pub fn skip_pages(&mut self, input: &mut &[u8]) -> Result<Option<Item>, StreamError> {
        loop {
            if self.page_left > 0 {
                let n = self.page_left.min(input.len());
                *input = input.get(n..).unwrap_or_default();
                self.page_left -= n;
                self.offset += n as u64;
                if self.page_left > 0 {
                    return Ok(None);
                }
            }
            let item = self.handle_bytes(input)?;
            if item.is_some() || self.page_left == 0 {
                return Ok(item);
            }
        }
    }

    /// Bytes taken so far, page bytes included.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.offset + self.small.len() as u64
    }

    /// The RAM blocks; empty until they are announced.
    #[must_use]
    pub const fn table(&self) -> &Arc<BlockTable> {
        &self.ram.table
    }

    /// Which version of QEMU sends; certain when the last RAM section of the migration opens.
    #[must_use]
    pub fn generation(&self) -> Option<Generation> {
        self.rules.generation()
    }

    /// Whether the sender waits for the end of the return path after the load.
    pub(super) fn return_path(&self) -> bool {
        self.rules.answers()
    }

    /// Whether a RAM section is open, so that multifd channels may carry pages.
    pub(super) const fn in_ram(&self) -> bool {
        self.ram.started
            && matches!(
                self.step,
                Step::RamType
                    | Step::RamId(_)
                    | Step::Command
                    | Step::LiveType
                    | Step::LiveCommand
                    | Step::LiveId
                    | Step::Record
                    | Step::NameLen(_)
                    | Step::BlockName(..)
                    | Step::Fill(_)
            )
    }

    /// A page that came on a multifd channel. In a checkpoint each stands once, on whatever way.
    pub(super) fn claim(&mut self, page: PageRun) -> bool {
        if !self.ram.live {
            return true;
        }
        let free = self.ram.seen.intersects(page) == Some(false);
        self.ram.seen.insert(page);
        free
    }

    /// Whether the stream stands between checkpoints, the only place where it may end.
    ///
    /// # Errors
    /// In what it was cut. If a description was there and did not fit, that is the error.
    pub fn finish(&self) -> Result<(), StreamError> {
        if let Some(failed) = &self.failed {
            return Err(failed.clone());
        }
        let (field, have, need) = if self.page_left > 0 {
            ("page", PAGE_BYTES - self.page_left, PAGE_BYTES)
        } else {
            match self.step {
                Step::Message(Turn::Request) if self.small.is_empty() => return Ok(()),
                Step::Devices => match self.devices.refusal() {
                    Some((within, flaw)) => {
                        return Err(flaw.clone().within(*within, self.devices.base));
                    }
                    None => (
                        "device sections and description",
                        self.devices.len(),
                        self.devices.len() + 1,
                    ),
                },
                Step::Blob(size) => ("blob", self.blob.len(), size),
                step => (step.field(), self.small.len(), step.need()),
            }
        };
        let expected = if matches!(self.step, Step::Devices) {
            "the end mark and a description that fits".into()
        } else {
            Expected::Text(alloc::format!("{need} bytes").into())
        };
        Err(StreamError {
            offset: self.offset(),
            within: self.within(),
            field,
            fault: Fault::Truncated,
            got: Got::EndAfter(have as u64),
            expected,
        })
    }

    fn advance(&mut self, input: &mut &[u8]) -> Result<Option<Item>, StreamError> {
        while self.page_left == 0 {
            let item = match self.step {
                Step::Devices => {
                    if input.is_empty() {
                        return Ok(None);
                    }
                    self.initial_devices(input)?
                }
                Step::Blob(size) => {
                    let n = input.len().min(size - self.blob.len());
                    if n == 0 {
                        return Ok(None);
                    }
                    let (now, rest) = input.split_at(n);
                    *input = rest;
                    self.blob.extend_from_slice(now);
                    self.offset += n as u64;
                    if self.blob.len() < size {
                        return Ok(None);
                    }
                    self.whole_blob()?
                }
                step => {
                    let need = step.need();
                    if self.small.is_empty() && input.len() >= need {
                        let (now, rest) = input.split_at(need);
                        *input = rest;
                        self.take(now)?
                    } else {
                        let n = input.len().min(need - self.small.len());
                        let (now, rest) = input.split_at(n);
                        *input = rest;
                        self.small.extend_from_slice(now);
                        if self.small.len() < need {
                            return Ok(None);
                        }
                        let mut small = core::mem::take(&mut self.small);
                        let item = self.take(&small)?;
                        small.clear();
                        self.small = small;
                        item
                    }
                }
            };
            if item.is_some() {
                return Ok(item);
            }
        }
        Ok(None)
    }

    /// One small item, whole.
    #[inline]
    fn take(&mut self, bytes: &[u8]) -> Result<Option<Item>, StreamError> {
        let base = self.offset;
        let within = self.step;
        self.offset += bytes.len() as u64;
        self.dispatch(bytes, base)
            .map_err(|flaw| flaw.within(self.within_step(within), base))
    }

    #[inline]
    fn dispatch(&mut self, bytes: &[u8], base: u64) -> Result<Option<Item>, Flaw> {
        match self.step {
            Step::Record
            | Step::NameLen(_)
            | Step::BlockName(..)
            | Step::Fill(_)
            | Step::Footer => self.ram_step(bytes, base),
            Step::Message(_)
            | Step::LiveType
            | Step::LiveCommand
            | Step::LiveId
            | Step::LiveEnd
            | Step::Size => self.colo_step(bytes),
            _ => self.initial_step(bytes),
        }
    }

    fn within(&self) -> Within {
        self.within_step(self.step)
    }

    fn within_step(&self, step: Step) -> Within {
        step.within(self.ram.live, self.ram.table.blocks().is_empty())
    }
}

/// A page's length as a count of bytes in memory.
const PAGE_BYTES: usize = PAGE_SIZE as usize;
