//! Header to description (spec qemu 2, 3, 4, 5).

use alloc::{sync::Arc, vec::Vec};

use nom::{
    IResult, Parser,
    bytes::complete::take,
    number::complete::{be_u8, be_u16, be_u32},
};

use super::{
    super::{
        MAGIC, VERSION,
        config::{self, Coming, Configuration},
        device::{Devices, Known},
        error::{Expected, Fault, Feature, Flaw, Got, StreamError},
        generation,
        item::{Item, SectionId},
        kind,
        writer::RAM_VERSION,
    },
    CHUNK, Open, Ram, Reader,
    step::{Step, Turn},
};
use crate::ram::PageSet;

/// Parses a whole small item. The reader has seen to its length.
pub(super) fn parse<'a, T>(
    bytes: &'a [u8],
    field: &'static str,
    parser: impl FnOnce(&'a [u8]) -> IResult<&'a [u8], T>,
) -> Result<T, Flaw> {
    match parser(bytes) {
        Ok((_, value)) => Ok(value),
        Err(_) => Err(Flaw::new(
            0,
            field,
            Fault::Truncated,
            Got::EndAfter(bytes.len() as u64),
            "the whole field",
        )),
    }
}

impl Reader {
    pub(super) fn initial_step(&mut self, bytes: &[u8]) -> Result<Option<Item>, Flaw> {
        match self.step {
            Step::Header => self.header(bytes).map(Some),
            Step::ConfigHead => self.config_head(bytes),
            Step::Machine(_) => {
                self.preamble.machine = Some(config::machine(bytes, &self.expect)?);
                self.step = Step::PreambleType;
                Ok(None)
            }
            Step::PreambleType => self.preamble_type(bytes),
            Step::SubLen => {
                self.step = Step::SubName(length(bytes, "subsection name")?);
                Ok(None)
            }
            Step::SubName(n) => {
                let (name, version) =
                    parse(bytes, "subsection name", |i| (take(n), be_u32).parse(i))?;
                let already = &self.preamble.subsections;
                self.step = Step::SubBody(config::coming(name, version, already)?);
                Ok(None)
            }
            Step::SubBody(coming) => self.subsection(coming, bytes),
            Step::CapabilityLen => {
                self.step = Step::Capability(length(bytes, "capability")?);
                Ok(None)
            }
            Step::Capability(_) => Err(config::capability(bytes)),
            Step::Command => self.command(bytes),
            Step::CommandData(number) => self.command_data(number, bytes),
            Step::StartHead => {
                let (id, n) = parse(bytes, "section name", |i| (be_u32, be_u8).parse(i))?;
                self.ram.id = SectionId(id);
                if n == 0 {
                    return Err(Flaw::new(4, "section name", Fault::Malformed, n, "`ram`"));
                }
                self.step = Step::StartName(usize::from(n));
                Ok(None)
            }
            Step::StartName(n) => {
                start_name(bytes, n)?;
                self.step = Step::TableHead;
                Ok(None)
            }
            Step::TableHead => self.table_head(bytes),
            Step::BlockLen => {
                self.step = Step::Block(length(bytes, "block name")?);
                Ok(None)
            }
            Step::Block(n) => self.block(bytes, n),
            Step::TableEnd => self.table_end(bytes),
            Step::RamType => self.ram_type(bytes),
            Step::RamId(kind) => {
                let end = kind == kind::END;
                self.ram
                    .open(bytes, if end { Open::End } else { Open::Part })?;
                if end {
                    self.rules.end()?;
                } else {
                    self.rules.part()?;
                }
                self.step = Step::Record;
                let id = self.ram.id;
                Ok(Some(if end {
                    Item::RamEnd(id)
                } else {
                    Item::RamPart(id)
                }))
            }
            // Handled by the other rooms.
            _ => Ok(None),
        }
    }

    fn header(&mut self, bytes: &[u8]) -> Result<Item, Flaw> {
        let (magic, version) = parse(bytes, "magic", |i| (be_u32, be_u32).parse(i))?;
        if magic != MAGIC {
            return Err(Flaw::new(0, "magic", Fault::Mismatch, magic, MAGIC));
        }
        if version != VERSION {
            return Err(Flaw::new(4, "version", Fault::Unknown, version, VERSION));
        }
        self.step = Step::ConfigHead;
        Ok(Item::Header)
    }

    fn config_head(&mut self, bytes: &[u8]) -> Result<Option<Item>, Flaw> {
        let (kind, n) = parse(bytes, "configuration", |i| (be_u8, be_u32).parse(i))?;
        if kind != kind::CONFIGURATION {
            return Err(Flaw::new(
                0,
                "section type",
                Fault::Missing,
                kind,
                "7, the configuration; machine types of QEMU 2.3 and older do not send it",
            ));
        }
        let limit = self.limits.machine.min(255);
        match usize::try_from(n) {
            Ok(length) if (1..=limit).contains(&n) => {
                self.step = Step::Machine(length);
                Ok(None)
            }
            _ => Err(Flaw::new(
                1,
                "machine name length",
                Fault::OverLimit,
                n,
                Expected::Text(alloc::format!("1 to {limit}").into()),
            )),
        }
    }

    /// The type of what follows the configuration. Whatever it is, the configuration is whole
    /// unless one more of its subsections comes.
    fn preamble_type(&mut self, bytes: &[u8]) -> Result<Option<Item>, Flaw> {
        let got = bytes.first().copied().unwrap_or_default();
        self.step = match got {
            kind::SUBSECTION if self.preamble.machine.is_some() => {
                self.step = Step::SubLen;
                return Ok(None);
            }
            kind::COMMAND => Step::Command,
            kind::START => {
                self.rules.start()?;
                Step::StartHead
            }
            kind::CONFIGURATION => {
                return Err(Flaw::new(
                    0,
                    "section type",
                    Fault::Repeated,
                    got,
                    "one configuration",
                ));
            }
            _ => {
                return Err(Flaw::new(
                    0,
                    "section type",
                    Fault::OutOfPlace,
                    got,
                    "5 (subsection), 8 (command) or 1 (start)",
                ));
            }
        };
        let subsections = core::mem::take(&mut self.preamble.subsections);
        Ok(self.preamble.machine.take().map(|machine| {
            Item::Configuration(Arc::new(Configuration {
                machine,
                subsections,
            }))
        }))
    }

    fn subsection(&mut self, coming: Coming, bytes: &[u8]) -> Result<Option<Item>, Flaw> {
        let subsection = match coming {
            Coming::PageBits => config::page_bits(parse(bytes, "target page bits", be_u32)?)?,
            Coming::Capabilities => {
                let count = parse(bytes, "capability count", be_u32)?;
                if count > 0 {
                    self.step = Step::CapabilityLen;
                    return Ok(None);
                }
                config::Subsection::NoCapabilities
            }
            Coming::Uuid => {
                let uuid = bytes.first_chunk().copied().unwrap_or_default();
                config::uuid(uuid, &self.expect)?
            }
        };
        self.preamble.subsections.push(subsection);
        self.step = Step::PreambleType;
        Ok(None)
    }

    fn command(&mut self, bytes: &[u8]) -> Result<Option<Item>, Flaw> {
        let (number, n) = parse(bytes, "command", |i| (be_u16, be_u16).parse(i))?;
        if self.ram.started {
            self.rules.before_ram(number, n, false)?;
        } else {
            self.rules.opening(number, n)?;
        }
        if n > 0 {
            self.step = Step::CommandData(number);
            return Ok(None);
        }
        self.commanded(number, 0)
    }

    fn command_data(&mut self, number: u16, bytes: &[u8]) -> Result<Option<Item>, Flaw> {
        let data = parse(bytes, "data of a command", be_u32)?;
        self.commanded(number, data)
    }

    fn commanded(&mut self, number: u16, data: u32) -> Result<Option<Item>, Flaw> {
        self.step = if self.ram.started {
            Step::RamType
        } else {
            Step::PreambleType
        };
        Ok(generation::command(number, data).map(Item::Command))
    }

    fn ram_type(&mut self, bytes: &[u8]) -> Result<Option<Item>, Flaw> {
        let got = bytes.first().copied().unwrap_or_default();
        self.step = match got {
            kind::PART | kind::END => Step::RamId(got),
            kind::COMMAND => Step::Command,
            _ => {
                let fault = match got {
                    kind::START | kind::CONFIGURATION => Fault::Repeated,
                    _ => Fault::OutOfPlace,
                };
                return Err(Flaw::new(
                    0,
                    "section type",
                    fault,
                    got,
                    "2 (part) or 3 (end) of the ram section",
                ));
            }
        };
        Ok(None)
    }

    /// Device sections and description, in pieces of any length.
    pub(super) fn initial_devices(
        &mut self,
        input: &mut &[u8],
    ) -> Result<Option<Item>, StreamError> {
        if self.devices.is_empty() {
            self.devices.base = self.offset;
        }
        let base = self.devices.base;
        // In pieces: the input may go on far behind the description.
        let (bytes, rest) = input.split_at(input.len().min(CHUNK));
        let found = self
            .devices
            .push(bytes, &self.limits, self.ram.id)
            .map_err(|(within, flaw)| flaw.within(within, base))?;
        let Some(found) = found else {
            self.offset += bytes.len() as u64;
            *input = rest;
            return Ok(None);
        };
        let taken = bytes.len() - found.surplus;
        *input = input.get(taken..).unwrap_or_default();
        self.offset += taken as u64;
        self.known = found.sections.iter().map(Known::from).collect::<Vec<_>>();
        self.ram.seen = PageSet::new(&self.ram.table.slots());
        self.step = Step::Message(Turn::Request);
        self.queued = Some(Item::Description(found.description));
        Ok(Some(Item::Devices(Devices::new(
            found.devices,
            found.sections,
        ))))
    }
}

impl Ram {
    /// Opens a section of the RAM id.
    pub(super) fn open(&mut self, id: &[u8], section: Open) -> Result<(), Flaw> {
        let id = id.first_chunk().map_or(0, |id| u32::from_be_bytes(*id));
        if id != self.id.0 {
            return Err(Flaw::new(0, "section id", Fault::Unknown, id, self.id.0));
        }
        self.section = section;
        Ok(())
    }
}

/// The length of a `str8`.
fn length(bytes: &[u8], field: &'static str) -> Result<usize, Flaw> {
    match bytes.first() {
        Some(&n @ 1..) => Ok(usize::from(n)),
        _ => Err(Flaw::new(
            0,
            field,
            Fault::Malformed,
            0u32,
            "1 to 255 bytes",
        )),
    }
}

fn start_name(bytes: &[u8], n: usize) -> Result<(), Flaw> {
    let (name, instance, version) = parse(bytes, "section name", |i| {
        (take(n), be_u32, be_u32).parse(i)
    })?;
    if name != b"ram" {
        let fault = match name {
            b"block" => Fault::Unsupported(Feature::BlockMigration),
            b"dirty-bitmap" => Fault::Unsupported(Feature::DirtyBitmaps),
            _ => Fault::Unknown,
        };
        return Err(Flaw::new(
            0,
            "section name",
            fault,
            Got::name(name),
            Expected::Name("ram".into()),
        ));
    }
    if instance != 0 {
        return Err(Flaw::new(
            n,
            "section instance",
            Fault::Unknown,
            instance,
            0u32,
        ));
    }
    if version != RAM_VERSION {
        return Err(Flaw::new(
            n + 4,
            "section version",
            Fault::Unknown,
            version,
            RAM_VERSION,
        ));
    }
    Ok(())
}
