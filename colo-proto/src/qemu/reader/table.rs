//! The block table of the RAM start section (spec qemu 6).

use alloc::sync::Arc;

use nom::{Parser, bytes::complete::take, number::complete::be_u64};

use super::{
    super::{
        error::{Expected, Fault, Flaw, Got},
        item::{Block, BlockTable, Item, Name},
        record,
    },
    Open, Reader,
    initial::parse,
    step::Step,
};
use crate::id::PAGE_SIZE;

impl Reader {
    pub(super) fn table_head(&mut self, bytes: &[u8]) -> Result<Option<Item>, Flaw> {
        let word = parse(bytes, "block table", be_u64)?;
        let record::Head::MemSize { total } = record::head(word)? else {
            return Err(Flaw::new(
                0,
                "record flags",
                Fault::Missing,
                word % PAGE_SIZE,
                "4, the block table",
            ));
        };
        if total == 0 || total > self.limits.ram {
            return Err(Flaw::new(
                0,
                "size of all blocks",
                Fault::OverLimit,
                total,
                Expected::Text(alloc::format!("4096 to {}", self.limits.ram).into()),
            ));
        }
        self.ram.started = true;
        self.ram.unclaimed = total;
        self.step = Step::BlockLen;
        Ok(None)
    }

    pub(super) fn block(&mut self, bytes: &[u8], n: usize) -> Result<Option<Item>, Flaw> {
        let (name, length) = parse(bytes, "block", |i| (take(n), be_u64).parse(i))?;
        let name = Name::parse(name, "block name")?;
        let flaw =
            |fault, expected: Expected| Err(Flaw::new(n, "block length", fault, length, expected));
        if length == 0 || !length.is_multiple_of(PAGE_SIZE) {
            return flaw(Fault::Malformed, "whole pages, at least one".into());
        }
        if length > self.ram.unclaimed {
            return flaw(Fault::OverLimit, Expected::AtMost(self.ram.unclaimed));
        }
        let blocks = &mut self.ram.blocks;
        if blocks.iter().any(|b| b.name == name) {
            return Err(Flaw::new(
                0,
                "block name",
                Fault::Repeated,
                Got::name(name.as_bytes()),
                "each block once",
            ));
        }
        let limit = self.limits.blocks.min(usize::from(u16::MAX));
        if blocks.len() >= limit {
            return Err(Flaw::new(
                0,
                "number of blocks",
                Fault::OverLimit,
                blocks.len() + 1,
                Expected::AtMost(limit as u64),
            ));
        }
        if let Some(own) = &self.expect.blocks {
            agrees(own, blocks.len(), &name, length, n)?;
        }
        blocks.push(Block {
            name,
            bytes: length,
        });
        self.ram.unclaimed -= length;
        self.step = match self.ram.unclaimed {
            0 => Step::TableEnd,
            _ => Step::BlockLen,
        };
        Ok(None)
    }

    fn table_whole(&mut self) -> Result<(), Flaw> {
        let blocks = core::mem::take(&mut self.ram.blocks);
        if let Some(own) = &self.expect.blocks
            && own.blocks().len() != blocks.len()
        {
            return Err(Flaw::new(
                0,
                "number of blocks",
                Fault::Mismatch,
                blocks.len(),
                own.blocks().len() as u64,
            ));
        }
        self.ram.table = Arc::new(BlockTable(blocks));
        Ok(())
    }

    pub(super) fn table_end(&mut self, bytes: &[u8]) -> Result<Option<Item>, Flaw> {
        let word = parse(bytes, "end of the block table", be_u64)?;
        if word == record::FLUSH && !self.ram.multifd {
            self.ram.multifd = true;
            return Ok(None);
        }
        if word != record::EOS {
            return Err(Flaw::new(
                0,
                "end of the block table",
                Fault::OutOfPlace,
                word,
                record::EOS,
            ));
        }
        self.table_whole()?;
        self.ram.section = Open::Start;
        self.step = Step::Footer;
        Ok(None)
    }
}

/// Compares a block with this side's block in the same place.
fn agrees(own: &BlockTable, at: usize, name: &Name, length: u64, n: usize) -> Result<(), Flaw> {
    match own.blocks().get(at) {
        Some(block) if block.name != *name => Err(Flaw::new(
            0,
            "block name",
            Fault::Mismatch,
            Got::name(name.as_bytes()),
            Expected::Name(block.name.as_str().into()),
        )),
        Some(block) if block.bytes != length => Err(Flaw::new(
            n,
            "block length",
            Fault::Mismatch,
            length,
            block.bytes,
        )),
        Some(_) => Ok(()),
        None => Err(Flaw::new(
            0,
            "block name",
            Fault::Unknown,
            Got::name(name.as_bytes()),
            Expected::Text(own.names().into()),
        )),
    }
}
