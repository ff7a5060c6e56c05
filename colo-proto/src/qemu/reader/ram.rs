//! Records of a RAM section and the footer that closes it (spec qemu 6).

use alloc::sync::Arc;

use super::{
    super::{
        error::{Expected, Fault, Feature, Flaw, Got},
        item::{Item, PageRecord},
        kind, record,
    },
    Open, PAGE_BYTES, Reader,
    step::{Coded, Step},
};
use crate::id::Slot;

impl Reader {
    #[inline]
    pub(super) fn ram_step(&mut self, bytes: &[u8], base: u64) -> Result<Option<Item>, Flaw> {
        match self.step {
            Step::Record => {
                self.ram.record_at = base;
                self.record(bytes)
            }
            Step::NameLen(coded) => {
                let n = bytes.first().copied().unwrap_or_default();
                if n == 0 {
                    return Err(Flaw::new(
                        0,
                        "block name",
                        Fault::Malformed,
                        n,
                        "1 to 255 bytes",
                    ));
                }
                self.step = Step::BlockName(coded, usize::from(n));
                Ok(None)
            }
            Step::BlockName(coded, _) => {
                let slot = self.ram.table.slot(bytes).ok_or_else(|| {
                    Flaw::new(
                        0,
                        "block name",
                        Fault::Unknown,
                        Got::name(bytes),
                        Expected::Text(self.ram.table.names().into()),
                    )
                })?;
                let pages = self.ram.table.block(slot).map_or(0, |b| b.pages());
                self.ram.current = Some((slot, pages));
                self.located(coded)
            }
            Step::Fill(coded) => {
                let fill = bytes.first().copied().unwrap_or_default();
                if fill != 0 {
                    return Err(Flaw::new(0, "fill byte", Fault::Malformed, fill, 0u32));
                }
                let slot = self.ram.current.map_or(Slot(0), |(slot, _)| slot);
                self.page(slot, coded)
            }
            _ => self.footer(bytes),
        }
    }

    #[inline]
    fn record(&mut self, bytes: &[u8]) -> Result<Option<Item>, Flaw> {
        let word = bytes
            .first_chunk()
            .map_or(0, |word| u64::from_be_bytes(*word));
        let flushed = core::mem::take(&mut self.ram.flushed);
        match record::head(word)? {
            record::Head::Page { page, zero, named } => {
                let coded = Coded { page, zero, named };
                if named {
                    self.step = Step::NameLen(coded);
                    return Ok(None);
                }
                self.located(coded)
            }
            record::Head::Eos => {
                if self.ram.multifd
                    && !flushed
                    && matches!(self.ram.section, Open::End | Open::Live)
                {
                    return Err(Flaw::new(
                        0,
                        "record flags",
                        Fault::Missing,
                        "the end of the section",
                        "0x200 before it: the multifd channels' pages belong to this section",
                    ));
                }
                self.step = Step::Footer;
                Ok(None)
            }
            record::Head::Flush if self.ram.multifd => {
                self.ram.flushed = true;
                Ok(Some(Item::Flush))
            }
            record::Head::Flush => Err(Flaw::new(
                0,
                "record flags",
                Fault::Unsupported(Feature::Multifd),
                record::FLUSH,
                "multifd announced in the start section, as QEMU from 8.1 on does",
            )),
            record::Head::MemSize { .. } => Err(Flaw::new(
                0,
                "record flags",
                Fault::OutOfPlace,
                "a block table",
                "a page or the end of the section; the table stands once, in the start section",
            )),
        }
    }

    /// A record whose block is known.
    #[inline]
    fn located(&mut self, coded: Coded) -> Result<Option<Item>, Flaw> {
        // The offset stands in the record's head, before the block's name.
        let Some((slot, pages)) = self.ram.current else {
            return Err(Flaw::new(
                0,
                "record flags",
                Fault::OutOfPlace,
                "continue",
                "a block's name, none was given yet",
            ));
        };
        if coded.page >= pages {
            return Err(Flaw::new(
                0,
                "record offset",
                Fault::OverLimit,
                coded.page.saturating_mul(PAGE_BYTES as u64),
                Expected::Below(pages * PAGE_BYTES as u64),
            )
            .based(self.ram.record_at));
        }
        if coded.zero {
            self.step = Step::Fill(coded);
            return Ok(None);
        }
        self.page(slot, coded)
    }

    #[inline]
    fn page(&mut self, slot: Slot, coded: Coded) -> Result<Option<Item>, Flaw> {
        let record = PageRecord {
            slot,
            page: coded.page,
            zero: coded.zero,
            named: coded.named,
        };
        if self.ram.live {
            let run = record.run();
            if self.ram.seen.intersects(run) != Some(false) {
                return Err(Flaw::new(
                    0,
                    "record offset",
                    Fault::Repeated,
                    coded.page.saturating_mul(PAGE_BYTES as u64),
                    "each page once in a checkpoint",
                )
                .based(self.ram.record_at));
            }
            self.ram.seen.insert(run);
        }
        if !coded.zero {
            self.page = record.run();
            self.page_left = PAGE_BYTES;
        }
        self.step = Step::Record;
        Ok(Some(Item::Page(record)))
    }

    fn footer(&mut self, bytes: &[u8]) -> Result<Option<Item>, Flaw> {
        let (mark, id) = match *bytes {
            [mark, a, b, c, d] => (mark, u32::from_be_bytes([a, b, c, d])),
            _ => (0, 0),
        };
        if mark != kind::FOOTER {
            return Err(Flaw::new(
                0,
                "footer",
                Fault::Missing,
                mark,
                u32::from(kind::FOOTER),
            ));
        }
        if id != self.ram.id.0 {
            return Err(Flaw::new(
                1,
                "footer id",
                Fault::Mismatch,
                id,
                self.ram.id.0,
            ));
        }
        let id = self.ram.id;
        let (next, item) = match self.ram.section {
            Open::Start => {
                let table = Arc::clone(&self.ram.table);
                (
                    Step::RamType,
                    Item::RamStart {
                        id,
                        table,
                        multifd: self.ram.multifd,
                    },
                )
            }
            Open::Part => (Step::RamType, Item::SectionClosed(id)),
            Open::End => (Step::Devices, Item::SectionClosed(id)),
            Open::Live => (Step::LiveEnd, Item::SectionClosed(id)),
        };
        self.step = next;
        Ok(Some(item))
    }
}
