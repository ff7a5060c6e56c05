//! The head of a RAM record: flags in the low 12 bits, offset above (spec qemu 6).

use super::error::{Fault, Feature, Flaw};
use crate::id::PAGE_SIZE;

pub(super) const ZERO: u64 = 0x002;
pub(super) const MEM_SIZE: u64 = 0x004;
pub(super) const PAGE: u64 = 0x008;
pub(super) const EOS: u64 = 0x010;
pub(super) const CONTINUE: u64 = 0x020;
/// Waits for the multifd channels.
pub(super) const FLUSH: u64 = 0x200;
const FLAGS: u64 = PAGE_SIZE - 1;

/// A legal head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Head {
    /// A page, its bytes to come or a fill byte.
    Page { page: u64, zero: bool, named: bool },
    /// The block table.
    MemSize { total: u64 },
    /// The section's body is over.
    Eos,
    /// Everything on the multifd channels up to their next mark comes first.
    Flush,
}

pub(super) fn head(word: u64) -> Result<Head, Flaw> {
    const PAGE_ON: u64 = PAGE | CONTINUE;
    const ZERO_ON: u64 = ZERO | CONTINUE;
    let page = word / PAGE_SIZE;
    match word & FLAGS {
        flags @ (PAGE_ON | PAGE | ZERO_ON | ZERO) => Ok(Head::Page {
            page,
            zero: flags & ZERO != 0,
            named: flags & CONTINUE == 0,
        }),
        MEM_SIZE => Ok(Head::MemSize {
            total: word & !FLAGS,
        }),
        EOS if word == EOS => Ok(Head::Eos),
        FLUSH if word == FLUSH => Ok(Head::Flush),
        _ => Err(refusal(word)),
    }
}

pub(super) const fn page_word(page: u64, zero: bool, named: bool) -> u64 {
    let kind = if zero { ZERO } else { PAGE };
    let on = if named { 0 } else { CONTINUE };
    page.wrapping_mul(PAGE_SIZE) | kind | on
}

/// Why a word is no head.
#[cold]
fn refusal(word: u64) -> Flaw {
    let flags = word & FLAGS;
    let named = [
        (0x001, Feature::FullRam),
        (0x040, Feature::Xbzrle),
        (0x080, Feature::Rdma),
        (0x100, Feature::Compress),
    ];
    if let Some(&(_, feature)) = named.iter().find(|(bit, _)| flags & bit != 0) {
        return Flaw::new(
            0,
            "record flags",
            Fault::Unsupported(feature),
            flags,
            "zero, page, end of section, and continue with the first two",
        );
    }
    let (field, fault, got, expected) = match flags {
        0 => (
            "record flags",
            Fault::Malformed,
            flags,
            "one kind of record",
        ),
        EOS => (
            "record offset",
            Fault::Malformed,
            word & !FLAGS,
            "0 at the end of a section",
        ),
        f if f & !0x03E != 0 => ("record flags", Fault::Unknown, f, "bits 0x002 to 0x020"),
        f => (
            "record flags",
            Fault::Malformed,
            f,
            "exactly one kind, and continue only with a page",
        ),
    };
    Flaw::new(0, field, fault, got, expected)
}
