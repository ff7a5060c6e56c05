//! Device sections: opaque payloads without a length, and how their ends are found
//! (spec qemu 13).
//!
//! In the initial migration the description gives every size, and the sizes must tile the bytes
//! exactly. In a checkpoint there is no description: a section ends at its footer if a known
//! device or the end follows.

use alloc::vec::Vec;
use core::ops::Range;

use bytes::Bytes;
use nom::{
    IResult, Parser,
    bytes::complete::tag,
    multi::length_data,
    number::complete::{be_u8, be_u32},
};

use super::{
    description::Described,
    error::{Fault, Flaw, Got, Within},
    item::{Name, SectionId},
    kind,
    limits::Expectation,
};

/// Length of a footer.
pub(super) const FOOTER: usize = 5;

/// Device sections with their end mark, and where each lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Devices {
    bytes: Bytes,
    sections: Vec<DeviceSection>,
}

/// One device section.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceSection {
    /// The sender's number of it.
    pub id: SectionId,
    /// The device's name.
    pub name: Name,
    /// Which of the devices of this name.
    pub instance: u32,
    /// Version of the state.
    pub version: u32,
    /// Where its state lies in [`Devices::bytes`].
    pub payload: Range<usize>,
}

impl Devices {
    pub(super) const fn new(bytes: Bytes, sections: Vec<DeviceSection>) -> Self {
        Self { bytes, sections }
    }

    /// The bytes as they came, from the first section to the end mark.
    #[must_use]
    pub const fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The sections, in stream order.
    #[must_use]
    pub fn sections(&self) -> &[DeviceSection] {
        &self.sections
    }
}

/// A device of the initial migration, as later checkpoints must name it.
#[derive(Clone, Debug)]
pub(super) struct Known {
    id: SectionId,
    name: Name,
    instance: u32,
    version: u32,
    /// Length of its newest state: most devices keep it, so it is looked at first.
    length: usize,
}

impl From<&DeviceSection> for Known {
    fn from(section: &DeviceSection) -> Self {
        Self {
            id: section.id,
            name: section.name.clone(),
            instance: section.instance,
            version: section.version,
            length: section.payload.len(),
        }
    }
}

impl Known {
    fn is(&self, head: &Head<'_>) -> bool {
        self.id == head.id
            && self.name.as_bytes() == head.name
            && self.instance == head.instance
            && self.version == head.version
    }
}

/// The head of a device section.
struct Head<'a> {
    id: SectionId,
    name: &'a [u8],
    instance: u32,
    version: u32,
    /// Its own length.
    length: usize,
}

fn head(bytes: &[u8]) -> Option<Head<'_>> {
    fn parse(bytes: &[u8]) -> IResult<&[u8], (u32, &[u8], u32, u32)> {
        let (rest, (_, id, name, instance, version)) = (
            tag(&[kind::FULL][..]),
            be_u32,
            length_data(be_u8),
            be_u32,
            be_u32,
        )
            .parse(bytes)?;
        Ok((rest, (id, name, instance, version)))
    }
    let (rest, (id, name, instance, version)) = parse(bytes).ok()?;
    Some(Head {
        id: SectionId(id),
        name,
        instance,
        version,
        length: bytes.len() - rest.len(),
    })
}

fn footer_at(bytes: &[u8], at: usize, id: SectionId) -> bool {
    let Some(footer) = bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk::<FOOTER>())
    else {
        return false;
    };
    let [mark, a, b, c, d] = *footer;
    mark == kind::FOOTER && u32::from_be_bytes([a, b, c, d]) == id.0
}

type Located = (Within, Flaw);

/// Lays the described devices over `bytes`, which end with the end mark.
pub(super) fn tile(
    bytes: &[u8],
    described: &[Described],
    ram: SectionId,
) -> Result<Vec<DeviceSection>, Located> {
    let mut sections: Vec<DeviceSection> = Vec::with_capacity(described.len());
    let mut at = 0usize;
    for device in described {
        let flaw = |at, field, fault, got: Got, expected: &'static str| {
            (Within::Devices, Flaw::new(at, field, fault, got, expected))
        };
        let Some(head) = bytes.get(at..).and_then(head) else {
            return Err(flaw(
                at,
                "section",
                Fault::Missing,
                Got::name(device.name.as_bytes()),
                "the head of the section of the device that the description names",
            ));
        };
        if device.name.as_bytes() != head.name
            || device.instance != head.instance
            || device.version.is_some_and(|v| v != head.version)
        {
            return Err(flaw(
                at,
                "section name, instance and version",
                Fault::Mismatch,
                Got::name(head.name),
                "the device that the description names",
            ));
        }
        if head.id == ram || sections.iter().any(|s| s.id == head.id) {
            return Err(flaw(
                at + 1,
                "section id",
                Fault::Repeated,
                head.id.0.into(),
                "an id of its own",
            ));
        }
        let start = at + head.length;
        let end = usize::try_from(device.size)
            .ok()
            .and_then(|size| start.checked_add(size))
            .filter(|&end| footer_at(bytes, end, head.id))
            .ok_or_else(|| {
                (
                    Within::Device(head.id),
                    Flaw::new(
                        start,
                        "footer",
                        Fault::Missing,
                        device.size,
                        "a footer after as many bytes as the description gives the device",
                    ),
                )
            })?;
        sections.push(DeviceSection {
            id: head.id,
            name: device.name.clone(),
            instance: head.instance,
            version: head.version,
            payload: start..end,
        });
        at = end + FOOTER;
    }
    if bytes.get(at..) != Some(&[kind::EOF]) {
        return Err((
            Within::Devices,
            Flaw::new(
                at,
                "section",
                Fault::Mismatch,
                "a section that the description does not list",
                "the end mark after the last described device",
            ),
        ));
    }
    Ok(sections)
}

/// Splits the device sections of a checkpoint: known devices, each at most once, in their order,
/// then the end mark and nothing after it.
pub(super) fn split(
    bytes: &[u8],
    known: &mut [Known],
    expect: &Expectation,
) -> Result<Vec<DeviceSection>, Located> {
    let mut sections = Vec::with_capacity(known.len());
    let (mut at, mut next) = (0usize, 0usize);
    while bytes.get(at) != Some(&kind::EOF) || at + 1 != bytes.len() {
        let Some((which, head)) = follower(bytes, at, known, next) else {
            return Err((Within::Blob, stranger(bytes, at, known, next)));
        };
        present(known, next..which, expect, at)?;
        let start = at + head.length;
        let guess = known.get(which).map_or(0, |k| k.length);
        let ends = |end: usize| {
            footer_at(bytes, end, head.id) && {
                let after = end + FOOTER;
                bytes.get(after..) == Some(&[kind::EOF])
                    || follower(bytes, after, known, 0).is_some()
            }
        };
        let end = Some(start.saturating_add(guess))
            .filter(|&end| ends(end))
            .or_else(|| footers(bytes, start, head.id).find(|&end| ends(end)));
        let Some(end) = end else {
            // The last footer of this id is the likeliest end: what follows it is the fault.
            return Err(match footers(bytes, start, head.id).last() {
                Some(end) => (
                    Within::Blob,
                    stranger(bytes, end + FOOTER, known, which + 1),
                ),
                None => (
                    Within::Device(head.id),
                    Flaw::new(
                        start,
                        "footer",
                        Fault::Missing,
                        "none up to the end of the blob",
                        "0x7e and the id of the section",
                    ),
                ),
            });
        };
        if let Some(known) = known.get(which) {
            sections.push(DeviceSection {
                id: known.id,
                name: known.name.clone(),
                instance: known.instance,
                version: known.version,
                payload: start..end,
            });
        }
        (at, next) = (end + FOOTER, which + 1);
    }
    present(known, next..known.len(), expect, at)?;
    let mut lengths = sections.iter();
    let mut section = lengths.next();
    for known in known {
        if let Some(s) = section.filter(|s| s.id == known.id) {
            known.length = s.payload.len();
            section = lengths.next();
        }
    }
    Ok(sections)
}

/// Where footers of `id` may stand.
fn footers(bytes: &[u8], from: usize, id: SectionId) -> impl Iterator<Item = usize> {
    let rest = bytes.get(from..).unwrap_or_default();
    let marks = rest
        .iter()
        .enumerate()
        .filter(|(_, byte)| **byte == kind::FOOTER);
    marks
        .map(move |(at, _)| from + at)
        .filter(move |&at| footer_at(bytes, at, id))
}

/// The known device, not before `next`, whose head stands at `at`.
fn follower<'a>(
    bytes: &'a [u8],
    at: usize,
    known: &[Known],
    next: usize,
) -> Option<(usize, Head<'a>)> {
    let head = bytes.get(at..).and_then(head)?;
    let which = known.iter().skip(next).position(|known| known.is(&head))?;
    Some((next + which, head))
}

/// Refuses the absence of devices that are not optional.
fn present(
    known: &[Known],
    missing: Range<usize>,
    expect: &Expectation,
    at: usize,
) -> Result<(), Located> {
    let gone = known.get(missing).unwrap_or_default();
    match gone
        .iter()
        .find(|device| !expect.optional_devices.contains(&device.name))
    {
        None => Ok(()),
        Some(device) => Err((
            Within::Blob,
            Flaw::new(
                at,
                "section",
                Fault::Missing,
                Got::name(device.name.as_bytes()),
                "every device of the initial migration that is not declared optional",
            ),
        )),
    }
}

/// What is wrong with what stands where a device section or the end of the blob should.
fn stranger(bytes: &[u8], at: usize, known: &[Known], next: usize) -> Flaw {
    let flaw = |at, field, fault, got: Got, expected: &'static str| {
        Flaw::new(at, field, fault, got, expected)
    };
    let Some(&first) = bytes.get(at) else {
        return flaw(
            at,
            "section type",
            Fault::Truncated,
            Got::EndAfter(at as u64),
            "a device section or the end mark",
        );
    };
    if first == kind::EOF {
        return flaw(
            at + 1,
            "end of the blob",
            Fault::OutOfPlace,
            (bytes.len() - at - 1).into(),
            "no bytes after the end mark",
        );
    }
    let Some(head) = bytes.get(at..).and_then(head) else {
        return flaw(
            at,
            "section type",
            Fault::OutOfPlace,
            first.into(),
            "4 (a whole device section) or 0 (the end mark)",
        );
    };
    match known.iter().position(|k| k.id == head.id) {
        None => flaw(
            at + 1,
            "section id",
            Fault::Unknown,
            head.id.0.into(),
            "an id of the initial migration",
        ),
        Some(which) if which < next => flaw(
            at + 1,
            "section id",
            Fault::Repeated,
            head.id.0.into(),
            "each device once, in the order of the initial migration",
        ),
        Some(_) => flaw(
            at + 5,
            "section name, instance and version",
            Fault::Mismatch,
            Got::name(head.name),
            "those that this id had in the initial migration",
        ),
    }
}
