//! The COLO phase: REQUEST, SEND, the live part, SIZE, the blob (spec checkpoint 4).

use alloc::vec::Vec;

use super::{
    super::{
        device::{Devices, split},
        error::{Expected, Fault, Flaw, StreamError},
        generation,
        item::Item,
        kind,
        message::{self, Message},
    },
    Open, Reader,
    step::{Step, Turn},
};

/// The most that is set aside for a blob before its bytes arrive.
const BLOB_AT_FIRST: usize = 1 << 20;

impl Reader {
    pub(super) fn colo_step(&mut self, bytes: &[u8]) -> Result<Option<Item>, Flaw> {
        let item = match self.step {
            Step::Message(turn) => {
                let number = bytes.first_chunk().map_or(0, |n| u32::from_be_bytes(*n));
                match turn {
                    Turn::Request => {
                        message::only(number, Message::CheckpointRequest.number())?;
                        self.step = Step::Message(Turn::Send);
                        Some(Item::Message(Message::CheckpointRequest))
                    }
                    Turn::Send => {
                        message::only(number, Message::VmstateSend.number())?;
                        self.ram.seen.clear();
                        self.ram.live = true;
                        self.step = Step::LiveType;
                        Some(Item::Message(Message::VmstateSend))
                    }
                    Turn::Size => {
                        message::only(number, Message::VmstateSize(0).number())?;
                        self.step = Step::Size;
                        None
                    }
                }
            }
            Step::LiveType => {
                let got = bytes.first().copied().unwrap_or_default();
                if got == kind::COMMAND {
                    self.step = Step::LiveCommand;
                    return Ok(None);
                }
                if got != kind::END {
                    return Err(Flaw::new(
                        0,
                        "section type",
                        Fault::OutOfPlace,
                        got,
                        u32::from(kind::END),
                    ));
                }
                self.step = Step::LiveId;
                None
            }
            Step::LiveCommand => {
                let (number, length) = match *bytes {
                    [a, b, c, d] => (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])),
                    _ => (0, 0),
                };
                self.rules.before_ram(number, length, true)?;
                self.step = Step::LiveType;
                generation::command(number, 0).map(Item::Command)
            }
            Step::LiveId => {
                self.ram.open(bytes, Open::Live)?;
                self.rules.live()?;
                self.step = Step::Record;
                Some(Item::RamEnd(self.ram.id))
            }
            Step::LiveEnd => {
                let got = bytes.first().copied().unwrap_or_default();
                if got != kind::EOF {
                    return Err(Flaw::new(
                        0,
                        "end mark",
                        Fault::Missing,
                        got,
                        u32::from(kind::EOF),
                    ));
                }
                self.ram.live = false;
                self.step = Step::Message(Turn::Size);
                Some(Item::LiveOver)
            }
            _ => {
                let size = bytes.first_chunk().map_or(0, |n| u64::from_be_bytes(*n));
                self.blob_announced(size)?;
                Some(Item::Message(Message::VmstateSize(size)))
            }
        };
        Ok(item)
    }

    fn blob_announced(&mut self, size: u64) -> Result<(), Flaw> {
        let fits = usize::try_from(size)
            .ok()
            .filter(|_| size <= self.limits.devices);
        let Some(length) = fits else {
            return Err(Flaw::new(
                0,
                "size",
                Fault::OverLimit,
                size,
                Expected::AtMost(self.limits.devices),
            ));
        };
        if length == 0 {
            return Err(Flaw::new(
                0,
                "size",
                Fault::Malformed,
                size,
                "at least the end mark",
            ));
        }
        self.blob = Vec::with_capacity(length.min(BLOB_AT_FIRST));
        self.step = Step::Blob(length);
        Ok(())
    }

    /// The blob is in: it is a checkpoint only if it is valid.
    pub(super) fn whole_blob(&mut self) -> Result<Option<Item>, StreamError> {
        let base = self.offset - self.blob.len() as u64;
        let sections = split(&self.blob, &mut self.known, &self.expect)
            .map_err(|(within, flaw)| flaw.within(within, base))?;
        let bytes = core::mem::take(&mut self.blob);
        self.step = Step::Message(Turn::Request);
        Ok(Some(Item::Blob(Devices::new(bytes.into(), sections))))
    }
}
