//! Bodies of the control messages that have one, and tables of runs.

use alloc::{string::String, vec::Vec};
use bytes::{BufMut, Bytes, BytesMut};
use core::num::NonZeroU32;
use nom::{
    IResult, Parser,
    number::complete::{le_u16, le_u32, le_u64},
};

use super::frame::Kind;
use crate::{
    error::DecodeError,
    id::{PageRun, PageRuns, Slot},
};

/// Bytes of one run in a table: u64 first page, u32 pages, u16 slot, u16 zero.
pub const RUN_LEN: usize = 16;

/// Appends a table of runs.
pub fn encode_runs(runs: &PageRuns, out: &mut BytesMut) {
    for run in runs {
        out.put_u64_le(run.first);
        out.put_u32_le(run.pages.get());
        out.put_u16_le(run.slot.0);
        out.put_u16_le(0);
    }
}

/// Reads a table that is all of `bytes`. Order, overlap and emptiness are checked here; whether
/// the runs lie within memory is for who knows it.
///
/// # Errors
/// [`DecodeError`] naming the field that is wrong.
pub fn decode_runs(message: &'static str, mut bytes: &[u8]) -> Result<PageRuns, DecodeError> {
    let len = bytes.len() as u64;
    let mut runs = PageRuns::with_capacity(bytes.len() / RUN_LEN);
    while !bytes.is_empty() {
        let parsed: IResult<&[u8], _> = (le_u64, le_u32, le_u16, le_u16).parse(bytes);
        let Ok((rest, (first, pages, slot, zero))) = parsed else {
            return Err(DecodeError::BadLength {
                message,
                field: "runs",
                len,
            });
        };
        let bad = |field, got, expected| DecodeError::BadField {
            message,
            field,
            got,
            expected,
        };
        if zero != 0 {
            return Err(bad("reserved", u64::from(zero), "0"));
        }
        let pages = NonZeroU32::new(pages).ok_or_else(|| bad("pages", 0, "1 or more"))?;
        let run = PageRun {
            slot: Slot(slot),
            first,
            pages,
        };
        runs.push(run)
            .map_err(|run| bad("first page", run.first, "runs in order, none overlapping"))?;
        bytes = rest;
    }
    Ok(runs)
}

/// Body of [`Kind::VmstateSend`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmstateSend {
    /// The cut: last client frame the state has consumed.
    pub inputs: u64,
    /// Pages of the epoch on all lanes together.
    pub pages: u64,
}

impl VmstateSend {
    /// The body.
    #[must_use]
    pub fn encode(&self) -> [u8; 16] {
        let mut out = [0; 16];
        let (a, b) = out.split_at_mut(8);
        a.copy_from_slice(&self.inputs.to_le_bytes());
        b.copy_from_slice(&self.pages.to_le_bytes());
        out
    }

    /// Reads the body.
    ///
    /// # Errors
    /// [`DecodeError::BadLength`] unless it is 16 bytes.
    pub fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let parsed: IResult<&[u8], _> = (le_u64, le_u64).parse(body);
        match parsed {
            Ok(([], (inputs, pages))) => Ok(Self { inputs, pages }),
            _ => Err(DecodeError::BadLength {
                message: Kind::VmstateSend.name(),
                field: "pages",
                len: body.len() as u64,
            }),
        }
    }
}

/// Most reasons in a refusal.
const REASONS_MOST: usize = 256;
/// Longest text, in bytes.
const TEXT_MOST: usize = 240;

/// The body of a refusal: each reason cut to 240 bytes, at most 256 of them.
#[must_use]
pub fn encode_reasons(reasons: &[String]) -> Bytes {
    let mut out = BytesMut::new();
    for reason in reasons.iter().take(REASONS_MOST) {
        let mut end = reason.len().min(TEXT_MOST);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        out.put_slice(reason.get(..end).unwrap_or_default().as_bytes());
        out.put_u8(b'\n');
    }
    out.freeze()
}

/// Reads the body of a refusal or a leave; anything unprintable becomes `?`, so that a peer cannot
/// write to an operator's terminal.
#[must_use]
pub fn decode_reasons(body: &[u8]) -> Vec<String> {
    body.split(|b| *b == b'\n')
        .filter(|line| !line.is_empty())
        .take(REASONS_MOST)
        .map(|line| {
            String::from_utf8_lossy(line.get(..line.len().min(TEXT_MOST)).unwrap_or_default())
                .chars()
                .map(|c| if c.is_control() { '?' } else { c })
                .collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use alloc::{string::ToString, vec};
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn tables_come_back_as_written_and_rubbish_is_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(runs) = decode_runs("TEST", &bytes) {
                let mut out = BytesMut::new();
                encode_runs(&runs, &mut out);
                // Touching runs merge, so the second reading is the normal form of the first.
                prop_assert_eq!(decode_runs("TEST", &out).unwrap(), runs);
            }
        }

        #[test]
        fn reasons_survive_and_control_characters_do_not(body in proptest::collection::vec(any::<u8>(), 0..600)) {
            let reasons = decode_reasons(&body);
            prop_assert!(reasons.iter().all(|r| !r.chars().any(char::is_control)));
        }
    }

    #[test]
    fn a_table_with_an_empty_run_names_the_field() {
        let error = decode_runs("PAGES", &[0; 16]).unwrap_err();
        assert_eq!(error.to_string(), "PAGES: pages is 0, expected 1 or more");
        let error = decode_runs("PAGES", &[0; 17]).unwrap_err();
        assert!(matches!(error, DecodeError::BadField { .. }));
    }

    #[test]
    fn a_long_reason_is_cut_at_a_character() {
        let reasons = vec!["é".repeat(200), "short".to_string()];
        let back = decode_reasons(&encode_reasons(&reasons));
        assert_eq!(back[0].chars().count(), 120);
        assert_eq!(back[1], "short");
    }
}
