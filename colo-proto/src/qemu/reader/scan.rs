//! Finds the end of the initial device sections, which no length announces.
//!
//! Every place that looks like the end mark and a description is a candidate. It is the end if the
//! description reads well and its sizes tile the device sections exactly (spec qemu 13).

use alloc::vec::Vec;

use bytes::Bytes;

use super::super::{
    description::describe,
    device::{DeviceSection, FOOTER, tile},
    error::{Expected, Fault, Flaw, Got, Within},
    item::SectionId,
    kind,
    limits::Limits,
};

/// End mark, type, length and the first character of a description.
const SIGN: usize = 1 + 1 + 4 + 1;
/// Most candidates that are tried; a real stream has one.
const MOST: usize = 64;

type Located = (Within, Flaw);

/// Device sections and description, as far as they came.
#[derive(Clone, Debug, Default)]
pub(super) struct Scan {
    bytes: Vec<u8>,
    /// Offset of the first byte in the stream.
    pub(super) base: u64,
    /// Where the search for candidates goes on.
    scanned: usize,
    /// Candidates whose description has not come whole: index of the end mark, length.
    open: Vec<(usize, usize)>,
    tried: usize,
    refusal: Option<Located>,
}

/// The end was found.
pub(super) struct Found {
    pub(super) devices: Bytes,
    pub(super) sections: Vec<DeviceSection>,
    pub(super) description: Bytes,
    /// How many of the bytes pushed last lie behind the description.
    pub(super) surplus: usize,
}

impl Scan {
    pub(super) const fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(super) const fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Why the likeliest end was none.
    pub(super) const fn refusal(&self) -> Option<&Located> {
        self.refusal.as_ref()
    }

    pub(super) fn push(
        &mut self,
        bytes: &[u8],
        limits: &Limits,
        ram: SectionId,
    ) -> Result<Option<Found>, Located> {
        if let (true, Some(&first)) = (self.bytes.is_empty(), bytes.first())
            && first != kind::FULL
            && first != kind::EOF
        {
            let expected = "4 (a whole device section) or 0 (the end mark)";
            let flaw = Flaw::new(0, "section type", Fault::OutOfPlace, first, expected);
            return Err((Within::Devices, flaw));
        }
        self.bytes.extend_from_slice(bytes);
        self.search(limits);
        let mut settled = None;
        for at in 0..self.open.len() {
            let Some(&(mark, length)) = self.open.get(at) else {
                break;
            };
            let json = mark + SIGN - 1;
            let Some(text) = self.bytes.get(json..json + length) else {
                continue;
            };
            match self.fits(mark, text, ram) {
                Ok(sections) => {
                    settled = Some((mark, json, length, sections));
                    break;
                }
                Err(refusal) => {
                    self.refusal = Some(refusal);
                    self.tried += 1;
                }
            }
        }
        if let Some((mark, json, length, sections)) = settled {
            let end = json + length;
            let surplus = self.bytes.len() - end;
            self.bytes.truncate(end);
            let all = Bytes::from(core::mem::take(&mut self.bytes));
            return Ok(Some(Found {
                devices: all.slice(..=mark),
                description: all.slice(json..),
                sections,
                surplus,
            }));
        }
        let have = self.bytes.len();
        self.open
            .retain(|(mark, length)| mark + SIGN - 1 + length > have);
        self.bounded(limits)?;
        Ok(None)
    }

    /// Notes every new candidate.
    fn search(&mut self, limits: &Limits) {
        while let Some(sign) = self
            .bytes
            .get(self.scanned..)
            .and_then(|rest| rest.first_chunk::<SIGN>())
        {
            let at = self.scanned;
            self.scanned += 1;
            let [mark, kind, a, b, c, d, brace] = *sign;
            if mark != kind::EOF || kind != kind::DESCRIPTION || brace != b'{' {
                continue;
            }
            let footer = at
                .checked_sub(FOOTER)
                .and_then(|footer| self.bytes.get(footer))
                .copied();
            if at != 0 && footer != Some(kind::FOOTER) {
                continue;
            }
            let length = u32::from_be_bytes([a, b, c, d]);
            match usize::try_from(length) {
                Ok(length) if length <= limits.description as usize => {
                    self.open.push((at, length));
                }
                _ => {
                    let limit = Expected::AtMost(limits.description.into());
                    let flaw = Flaw::new(at + 2, "length", Fault::OverLimit, length, limit);
                    self.refusal = Some((Within::Description, flaw));
                    self.tried += 1;
                }
            }
        }
    }

    fn fits(
        &self,
        mark: usize,
        json: &[u8],
        ram: SectionId,
    ) -> Result<Vec<DeviceSection>, Located> {
        let described = describe(json).map_err(|error| {
            let at = mark + SIGN - 1 + error.at;
            let flaw = Flaw::new(
                at,
                "description",
                Fault::Malformed,
                Got::Text("something else"),
                error.expected,
            );
            (Within::Description, flaw)
        })?;
        tile(self.bytes.get(..=mark).unwrap_or_default(), &described, ram)
    }

    fn bounded(&mut self, limits: &Limits) -> Result<(), Located> {
        let waiting = self.open.iter().map(|(_, length)| *length as u64).max();
        let most = limits
            .devices
            .saturating_add(waiting.map_or(0, |length| length.saturating_add(SIGN as u64)));
        if self.tried > MOST || self.open.len() > MOST {
            return Err(self.refusal.take().unwrap_or_else(|| {
                let expected = Expected::AtMost(MOST as u64);
                let got = self.open.len();
                (
                    Within::Devices,
                    Flaw::new(0, "candidates for the end", Fault::OverLimit, got, expected),
                )
            }));
        }
        if self.bytes.len() as u64 > most {
            return Err(self.refusal.take().unwrap_or_else(|| {
                let expected = Expected::AtMost(limits.devices);
                let got = self.bytes.len();
                (
                    Within::Devices,
                    Flaw::new(0, "device sections", Fault::OverLimit, got, expected),
                )
            }));
        }
        Ok(())
    }
}
