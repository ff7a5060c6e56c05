//! HELLO and WELCOME: who is there, and whether the two machines can be one pair.

use alloc::{
    format,
    string::{String, ToString},
    vec::Vec,
};
use bytes::{BufMut, Bytes, BytesMut};
use nom::{
    IResult, Parser,
    bytes::complete::take,
    multi::length_data,
    number::complete::{le_u8, le_u16, le_u32, le_u64},
};

use crate::{
    error::DecodeError,
    id::Slot,
    ram::CacheMode,
    status::{Mode, ResumePolicy},
};

/// Version of the native protocol; peers of another version refuse each other.
pub const VERSION: u16 = 1;
/// Feature bits this build has. None is defined yet; unknown ones are ignored.
pub const FEATURES: u32 = 0;

/// Most memory slots in a hello.
const SLOTS_MOST: u16 = 512;
/// Most shape items in a hello: those of a configuration, and the settings of its member.
const SHAPE_MOST: u16 = 1024 + 64;

/// One thing that must be the same on both hosts: a CPUID leaf, a device, a size.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ShapeItem {
    /// Its name, at most 255 bytes: `"cpuid 0x7.0 ebx"`, `"device 2"`.
    pub name: String,
    /// Its value, at most 255 bytes.
    pub value: String,
}

impl ShapeItem {
    /// Whether the peer reads it as it is: longer texts are cut on the wire, and control characters
    /// are replaced where they are read.
    #[must_use]
    pub fn is_readable(&self) -> bool {
        [&self.name, &self.value]
            .into_iter()
            .all(|text| text.len() <= 255 && !text.chars().any(char::is_control))
    }
}

/// What each side says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Hello {
    /// [`VERSION`] of the sender.
    pub version: u16,
    /// [`FEATURES`] of the sender.
    pub features: u32,
    /// The VM this pair protects.
    pub pair: [u8; 16],
    /// The sender's node.
    pub node: u64,
    /// The sender's process.
    pub boot: u64,
    /// RAM lanes; the primary's count is used.
    pub lanes: u8,
    /// How the secondary keeps a coming epoch; the secondary's choice is used.
    pub cache: CacheMode,
    /// Mode to begin with; the primary's is used.
    pub mode: Mode,
    /// The primary's is used.
    pub resume: ResumePolicy,
    /// Memory (and disk) slots and their sizes in pages.
    pub slots: Vec<(Slot, u64)>,
    /// Everything else that must be the same.
    pub shape: Vec<ShapeItem>,
}

impl Hello {
    /// The body.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::new();
        out.put_u16_le(self.version);
        out.put_u32_le(self.features);
        out.put_slice(&self.pair);
        out.put_u64_le(self.node);
        out.put_u64_le(self.boot);
        out.put_u8(self.lanes);
        out.put_u8(u8::from(self.cache == CacheMode::Full));
        out.put_u8(u8::from(self.mode == Mode::Lockstep));
        out.put_u8(u8::from(self.resume == ResumePolicy::AfterLoad));
        out.put_u16_le(u16::try_from(self.slots.len()).unwrap_or(u16::MAX));
        for (slot, pages) in &self.slots {
            out.put_u16_le(slot.0);
            out.put_u64_le(*pages);
        }
        out.put_u16_le(u16::try_from(self.shape.len()).unwrap_or(u16::MAX));
        for item in &self.shape {
            for text in [&item.name, &item.value] {
                let mut end = text.len().min(255);
                while !text.is_char_boundary(end) {
                    end -= 1;
                }
                let text = text.get(..end).unwrap_or_default();
                out.put_u8(u8::try_from(text.len()).unwrap_or(u8::MAX));
                out.put_slice(text.as_bytes());
            }
        }
        out.freeze()
    }

    /// Reads the body. Only the version is certain to be readable from a peer of another version:
    /// if it differs, the rest is not looked at.
    ///
    /// # Errors
    /// [`DecodeError`] naming the field.
    pub fn decode(message: &'static str, body: &[u8]) -> Result<Self, DecodeError> {
        let fail = |field| DecodeError::BadLength {
            message,
            field,
            len: body.len() as u64,
        };
        let (mut rest, version) = le::<u16>(le_u16(body), fail("version"))?;
        if version != VERSION {
            return Err(DecodeError::BadField {
                message,
                field: "version",
                got: u64::from(version),
                expected: "1; give both hosts the same release",
            });
        }
        let fixed: IResult<&[u8], _> = (
            le_u32,
            take(16usize),
            le_u64,
            le_u64,
            le_u8,
            le_u8,
            le_u8,
            le_u8,
        )
            .parse(rest);
        let (after, (features, pair_bytes, node, boot, lanes, cache, mode, resume)) =
            fixed.map_err(|_| fail("resume"))?;
        rest = after;
        let mut pair = [0; 16];
        pair.copy_from_slice(pair_bytes);
        let flag = |field, value: u8| match value {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(DecodeError::BadField {
                message,
                field,
                got: u64::from(other),
                expected: "0 or 1",
            }),
        };
        let count = |rest, field, most: u16| {
            let (rest, n) = le::<u16>(le_u16(rest), fail(field))?;
            if n > most {
                return Err(DecodeError::TooLong {
                    message,
                    len: u64::from(n),
                    limit: u64::from(most),
                });
            }
            Ok((rest, n))
        };
        let (after, n) = count(rest, "slots", SLOTS_MOST)?;
        rest = after;
        let mut slots = Vec::new();
        for _ in 0..n {
            let parsed: IResult<&[u8], _> = (le_u16, le_u64).parse(rest);
            let (after, (slot, pages)) = parsed.map_err(|_| fail("slots"))?;
            slots.push((Slot(slot), pages));
            rest = after;
        }
        let (after, n) = count(rest, "shape", SHAPE_MOST)?;
        rest = after;
        let mut shape = Vec::new();
        for _ in 0..n {
            let parsed: IResult<&[u8], _> = (length_data(le_u8), length_data(le_u8)).parse(rest);
            let (after, (name, value)): (_, (&[u8], &[u8])) = parsed.map_err(|_| fail("shape"))?;
            let text = |bytes: &[u8]| -> String {
                String::from_utf8_lossy(bytes)
                    .chars()
                    .map(|c| if c.is_control() { '?' } else { c })
                    .collect()
            };
            shape.push(ShapeItem {
                name: text(name),
                value: text(value),
            });
            rest = after;
        }
        if !rest.is_empty() {
            return Err(fail("shape"));
        }
        Ok(Self {
            version,
            features,
            pair,
            node,
            boot,
            lanes,
            cache: if flag("cache", cache)? {
                CacheMode::Full
            } else {
                CacheMode::Union
            },
            mode: if flag("mode", mode)? {
                Mode::Lockstep
            } else {
                Mode::Standby
            },
            resume: if flag("resume", resume)? {
                ResumePolicy::AfterLoad
            } else {
                ResumePolicy::AfterCapture
            },
            slots,
            shape,
        })
    }

    /// Everything about `theirs` that keeps these two from being a pair; empty if nothing does.
    #[must_use]
    pub fn differences(&self, theirs: &Self) -> Vec<String> {
        let mut reasons = Vec::new();
        if self.pair != theirs.pair {
            reasons.push("another VM: the pair ids differ".to_string());
        }
        if self.node == theirs.node {
            reasons.push(format!(
                "both hosts call themselves node {}: give each its own node id",
                self.node
            ));
        }
        if self.slots != theirs.slots {
            reasons.push(format!(
                "memory differs: {} here, {} there",
                sizes(&self.slots),
                sizes(&theirs.slots)
            ));
        }
        for item in &self.shape {
            match theirs.shape.iter().find(|t| t.name == item.name) {
                None => reasons.push(format!(
                    "{} is {} here and missing there",
                    item.name, item.value
                )),
                Some(t) if t.value != item.value => reasons.push(format!(
                    "{} is {} here and {} there",
                    item.name, item.value, t.value
                )),
                Some(_) => {}
            }
        }
        for item in &theirs.shape {
            if !self.shape.iter().any(|o| o.name == item.name) {
                reasons.push(format!(
                    "{} is {} there and missing here",
                    item.name, item.value
                ));
            }
        }
        reasons
    }
}

fn sizes(slots: &[(Slot, u64)]) -> String {
    let list: Vec<String> = slots
        .iter()
        .map(|(slot, pages)| format!("slot {slot} {} KiB", pages.saturating_mul(4)))
        .collect();
    list.join(", ")
}

fn le<T>(parsed: IResult<&[u8], T>, error: DecodeError) -> Result<(&[u8], T), DecodeError> {
    parsed.map_err(|_: nom::Err<nom::error::Error<&[u8]>>| error)
}

#[cfg(test)]
mod tests {
    use alloc::vec;
    use proptest::prelude::*;

    use super::*;

    fn hello() -> Hello {
        Hello {
            version: VERSION,
            features: FEATURES,
            pair: *b"0123456789abcdef",
            node: 1,
            boot: 77,
            lanes: 2,
            cache: CacheMode::Full,
            mode: Mode::Lockstep,
            resume: ResumePolicy::AfterLoad,
            slots: vec![(Slot(0), 10), (Slot(1), 20)],
            shape: vec![ShapeItem {
                name: "vcpus".into(),
                value: "2".into(),
            }],
        }
    }

    #[test]
    fn hellos_come_back_as_written() {
        let body = hello().encode();
        assert_eq!(Hello::decode("HELLO", &body).unwrap(), hello());
        for cut in 0..body.len() {
            assert!(
                Hello::decode("HELLO", &body[..cut]).is_err(),
                "cut at {cut}"
            );
        }
    }

    proptest! {
        #[test]
        fn rubbish_is_refused_without_panic(body in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Hello::decode("HELLO", &body);
        }
    }

    #[test]
    fn every_difference_is_listed() {
        let mut other = hello();
        other.node = 2;
        assert!(hello().differences(&other).is_empty());
        other.slots[1].1 = 21;
        other.shape[0].value = "4".into();
        other.shape.push(ShapeItem {
            name: "rng".into(),
            value: "yes".into(),
        });
        other.pair[0] = 0;
        assert_eq!(
            hello().differences(&other),
            [
                "another VM: the pair ids differ",
                "memory differs: slot 0 40 KiB, slot 1 80 KiB here, slot 0 40 KiB, slot 1 84 KiB there",
                "vcpus is 2 here and 4 there",
                "rng is yes there and missing here",
            ]
        );
    }

    #[test]
    fn another_version_is_named_before_anything_else_is_read() {
        let mut body = hello().encode().to_vec();
        body[0] = 9;
        body.truncate(3);
        assert_eq!(
            Hello::decode("HELLO", &body).unwrap_err().to_string(),
            "HELLO: version is 9, expected 1; give both hosts the same release"
        );
    }
}
