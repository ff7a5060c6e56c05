//! The configuration section: which machine sends (spec qemu 4).

use alloc::vec::Vec;

use super::{
    error::{Expected, Fault, Feature, Flaw, Got},
    item::Name,
    limits::Expectation,
};

/// The page size that both sides must have, as a power of two.
const PAGE_BITS: u32 = 12;

/// The configuration section.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Configuration {
    /// The machine type, with its version.
    pub machine: Name,
    /// Its subsections, in stream order.
    pub subsections: Vec<Subsection>,
}

/// A subsection of the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Subsection {
    /// The page size as a power of two; always 12.
    PageBits(u32),
    /// The capabilities that the sender checks; always none, the known one is refused.
    NoCapabilities,
    /// The VM's UUID.
    Uuid([u8; 16]),
}

impl Subsection {
    /// Its name on the wire.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::PageBits(_) => "configuration/target-page-bits",
            Self::NoCapabilities => "configuration/capabilities",
            Self::Uuid(_) => "configuration/uuid",
        }
    }
}

/// A subsection whose body is still to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Coming {
    PageBits,
    Capabilities,
    Uuid,
}

impl Coming {
    pub(super) const fn body(self) -> usize {
        match self {
            Self::PageBits | Self::Capabilities => 4,
            Self::Uuid => 16,
        }
    }
}

pub(super) fn machine(bytes: &[u8], expect: &Expectation) -> Result<Name, Flaw> {
    let name = Name::parse(bytes, "machine name")?;
    match &expect.machine {
        Some(own) if *own != name => Err(Flaw::new(
            0,
            "machine name",
            Fault::Mismatch,
            Got::name(bytes),
            Expected::Name(own.as_str().into()),
        )),
        Some(_) | None => Ok(name),
    }
}

/// Name and version of a subsection: `name` then be32.
pub(super) fn coming(name: &[u8], version: u32, already: &[Subsection]) -> Result<Coming, Flaw> {
    let coming = match name {
        b"configuration/target-page-bits" => Coming::PageBits,
        b"configuration/capabilities" => Coming::Capabilities,
        b"configuration/uuid" => Coming::Uuid,
        _ => {
            return Err(Flaw::new(
                0,
                "subsection name",
                Fault::Unknown,
                Got::name(name),
                "target-page-bits, capabilities or uuid of `configuration`",
            ));
        }
    };
    if already.iter().any(|s| s.name().as_bytes() == name) {
        return Err(Flaw::new(
            0,
            "subsection name",
            Fault::Repeated,
            Got::name(name),
            "each subsection once",
        ));
    }
    if version != 1 {
        return Err(Flaw::new(
            name.len(),
            "subsection version",
            Fault::Unknown,
            version,
            1u32,
        ));
    }
    Ok(coming)
}

pub(super) fn page_bits(bits: u32) -> Result<Subsection, Flaw> {
    if bits != PAGE_BITS {
        return Err(Flaw::new(
            0,
            "target page bits",
            Fault::Mismatch,
            bits,
            PAGE_BITS,
        ));
    }
    Ok(Subsection::PageBits(bits))
}

pub(super) fn uuid(uuid: [u8; 16], expect: &Expectation) -> Result<Subsection, Flaw> {
    match expect.uuid {
        Some(own) if own != uuid => Err(Flaw::new(
            0,
            "uuid",
            Fault::Mismatch,
            "another uuid",
            "this side's uuid",
        )),
        Some(_) => Ok(Subsection::Uuid(uuid)),
        None => {
            tracing::warn!("the sender has a uuid and this side has none to compare it with");
            Ok(Subsection::Uuid(uuid))
        }
    }
}

/// A capability that the sender wants to be equal on both sides: none can be.
pub(super) fn capability(name: &[u8]) -> Flaw {
    let fault = match name {
        b"x-ignore-shared" => Fault::Unsupported(Feature::IgnoreShared),
        b"xbzrle" => Fault::Unsupported(Feature::Xbzrle),
        b"compress" => Fault::Unsupported(Feature::Compress),
        b"multifd" => Fault::Unsupported(Feature::Multifd),
        b"postcopy-ram" => Fault::Unsupported(Feature::Postcopy),
        b"return-path" => Fault::Unsupported(Feature::ReturnPath),
        b"dirty-bitmaps" => Fault::Unsupported(Feature::DirtyBitmaps),
        b"block" => Fault::Unsupported(Feature::BlockMigration),
        _ => Fault::Unknown,
    };
    Flaw::new(0, "capability", fault, Got::name(name), "none")
}
