//! The RAM image of the newest whole state, and the pages of the coming one.
//!
//! The image is this process's own memory; no VM ever maps it. It changes by whole checkpoints
//! only: pages of an unfinished one wait in [`Staging`] and are forgotten with it.

use std::{io, sync::Arc};

use colo_proto::{
    id::{PAGE_SIZE, PageRun, Slot},
    qemu::{BlockTable, PageRecord},
};

use super::region::Region;

pub(super) const PAGE: usize = PAGE_SIZE as usize;
/// The staging area grows by this much.
const STEP: usize = 16 << 20;

/// RAM of a VM, block by block. Pages that were never written take no memory.
#[derive(Debug)]
pub(super) struct Image {
    table: Arc<BlockTable>,
    blocks: Vec<Region>,
}

impl Image {
    /// An image of zeros. The table's sizes have passed the reader's limits; the system may
    /// still refuse them.
    pub(super) fn new(table: &Arc<BlockTable>) -> io::Result<Self> {
        let region = |bytes: u64| Region::zeroed(usize::try_from(bytes).unwrap_or(usize::MAX));
        let blocks = table
            .blocks()
            .iter()
            .map(|b| region(b.bytes))
            .collect::<io::Result<_>>();
        Ok(Self {
            table: Arc::clone(table),
            blocks: blocks.map_err(|e| {
                let message = format!("{} bytes for the RAM image: {e}", table.bytes());
                io::Error::new(e.kind(), message)
            })?,
        })
    }

    pub(super) const fn table(&self) -> &Arc<BlockTable> {
        &self.table
    }

    /// The bytes of a page; empty if there is no such page.
    pub(super) fn page(&self, run: PageRun) -> &[u8] {
        let (slot, range) = place(run);
        self.blocks
            .get(slot)
            .and_then(|block| block.get(range))
            .unwrap_or_default()
    }

    pub(super) fn page_mut(&mut self, run: PageRun) -> &mut [u8] {
        let (slot, range) = place(run);
        self.blocks
            .get_mut(slot)
            .and_then(|block| block.get_mut(range))
            .unwrap_or_default()
    }

    /// Makes a page zero without touching it if it is zero already.
    pub(super) fn zero(&mut self, run: PageRun) {
        if !is_zero(self.page(run)) {
            self.page_mut(run).fill(0);
        }
    }
}

fn place(run: PageRun) -> (usize, std::ops::Range<usize>) {
    let Slot(slot) = run.slot;
    let first = usize::try_from(run.first).unwrap_or(usize::MAX);
    let at = first.saturating_mul(PAGE);
    (usize::from(slot), at..at.saturating_add(PAGE))
}

/// Whether a page is all zero.
pub(super) fn is_zero(page: &[u8]) -> bool {
    let (words, rest) = page.as_chunks::<16>();
    words.iter().all(|w| u128::from_ne_bytes(*w) == 0) && rest.iter().all(|b| *b == 0)
}

/// Pages of a checkpoint that is not whole yet.
#[derive(Debug, Default)]
pub(super) struct Staging {
    records: Vec<PageRecord>,
    bytes: Vec<u8>,
}

impl Staging {
    /// Takes note of a page. Its bytes, if it has any, go to [`page_mut`](Self::page_mut) of what
    /// is given back.
    pub(super) fn push(&mut self, record: PageRecord) -> usize {
        let at = self.bytes.len();
        self.records.push(record);
        if !record.zero {
            let length = self.bytes.len() + PAGE;
            if length > self.bytes.capacity() {
                // In steps, not by doubling: it never holds much more than came.
                self.bytes.reserve_exact(STEP);
            }
            self.bytes.resize(length, 0);
        }
        at
    }

    /// Where the bytes of a page belong.
    pub(super) fn page_mut(&mut self, at: usize) -> &mut [u8] {
        self.bytes.get_mut(at..at + PAGE).unwrap_or_default()
    }

    pub(super) const fn pages(&self) -> usize {
        self.records.len()
    }

    pub(super) fn records(&self) -> &[PageRecord] {
        &self.records
    }

    /// The checkpoint is whole: its pages become the image.
    pub(super) fn commit(&self, image: &mut Image) {
        let mut pages = self.bytes.chunks_exact(PAGE);
        for record in &self.records {
            if record.zero {
                image.zero(record.run());
            } else if let Some(page) = pages.next() {
                let into = image.page_mut(record.run());
                if into.len() == page.len() {
                    into.copy_from_slice(page);
                }
            }
        }
    }

    /// Forgets the pages: they are committed, or never became whole.
    pub(super) fn clear(&mut self) {
        self.records.clear();
        self.bytes.clear();
    }
}
