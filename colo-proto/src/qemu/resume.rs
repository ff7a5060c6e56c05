//! A held checkpoint as an ordinary migration stream (spec qemu 14).
//!
//! ```text
//! header  configuration  RAM START  PART: every page of every block  END: empty  blob  description
//! ```
//!
//! The RAM image and the zero test are the caller's; this module says what stands where.

use alloc::{sync::Arc, vec::Vec};
use core::num::NonZeroU32;

use bytes::Bytes;

use super::{
    config::Configuration,
    device::Devices,
    item::{BlockTable, SectionId},
    kind, writer,
};
use crate::id::{PageRun, Slot};

/// The next piece of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Segment {
    /// These bytes.
    Bytes(Bytes),
    /// The bytes of this page.
    Page(PageRun),
}

/// Writes a checkpoint as a migration stream, piece by piece.
#[derive(Clone, Debug)]
pub struct Resume {
    id: SectionId,
    table: Arc<BlockTable>,
    at: At,
    /// The page whose head was written last and whose bytes are due.
    due: Option<PageRun>,
    tail: Option<Bytes>,
    /// The beginning of the stream, handed out before the first page.
    start: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Start,
    Page { block: usize, page: u64 },
    Tail,
}

impl Resume {
    /// A stream from the initial migration's configuration, RAM section id and block table, and a
    /// checkpoint's device sections. Without the description QEMU prints a warning and loads all
    /// the same.
    #[must_use]
    pub fn new(
        configuration: &Configuration,
        id: SectionId,
        table: Arc<BlockTable>,
        devices: &Devices,
        description: Option<&Bytes>,
    ) -> Self {
        let mut start = Vec::new();
        writer::header(&mut start);
        writer::configuration(configuration, &mut start);
        writer::ram_start(id, &table, false, &mut start);
        writer::section(kind::PART, id, &mut start);

        let tail = Self::tail(id, devices, description);
        Self {
            id,
            table,
            at: At::Start,
            due: None,
            tail: Some(tail.into()),
            start,
        }
    }

    /// What closes the stream after the last page, in one piece.
    #[must_use]
    pub fn tail(id: SectionId, devices: &Devices, description: Option<&Bytes>) -> Vec<u8> {
        let mut out = Vec::new();
        writer::close(id, &mut out);
        writer::section(kind::END, id, &mut out);
        writer::close(id, &mut out);
        out.extend_from_slice(devices.bytes());
        if let Some(json) = description {
            writer::description(json, &mut out);
        }
        out
    }

    /// The next piece; `None` at the end. `is_zero` tells whether a page is all zero and is asked
    /// once for each, in order.
    pub fn poll(&mut self, mut is_zero: impl FnMut(PageRun) -> bool) -> Option<Segment> {
        /// Heads of zero pages are gathered up to about this many bytes.
        const GATHER: usize = 16 << 10;
        if let Some(page) = self.due.take() {
            return Some(Segment::Page(page));
        }
        let mut out = Vec::new();
        loop {
            match self.at {
                At::Start => {
                    out = core::mem::take(&mut self.start);
                    self.at = At::Page { block: 0, page: 0 };
                }
                At::Page { block, page } => {
                    let Some(entry) = self.table.blocks().get(block) else {
                        self.at = At::Tail;
                        continue;
                    };
                    let next = page + 1;
                    self.at = if next < entry.pages() {
                        At::Page { block, page: next }
                    } else {
                        At::Page {
                            block: block + 1,
                            page: 0,
                        }
                    };
                    let run = PageRun {
                        // The table's length fits a slot: the reader bounds it.
                        slot: Slot(u16::try_from(block).unwrap_or(u16::MAX)),
                        first: page,
                        pages: NonZeroU32::MIN,
                    };
                    let zero = is_zero(run);
                    let name = (page == 0).then_some(&entry.name);
                    writer::page_head(page, zero, name, &mut out);
                    if !zero {
                        self.due = Some(run);
                        return Some(Segment::Bytes(out.into()));
                    }
                    if out.len() >= GATHER {
                        return Some(Segment::Bytes(out.into()));
                    }
                }
                At::Tail if !out.is_empty() => return Some(Segment::Bytes(out.into())),
                At::Tail => return self.tail.take().map(Segment::Bytes),
            }
        }
    }

    /// The RAM section's id.
    #[must_use]
    pub const fn ram(&self) -> SectionId {
        self.id
    }
}
