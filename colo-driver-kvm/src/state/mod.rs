//! The state of a machine as named, versioned, checksummed sections.
//!
//! ```text
//!   "colostat" | format: u16
//!   section*:  name length: u8 (1..) | name | version: u16 | length: u32 | CRC-32C: u32 | bytes
//!   end:       0: u8 | number of sections: u16
//! ```
//!
//! All little-endian. The CRC covers name, version, length and bytes, so that a flipped bit
//! anywhere is an error that names the section.

pub(crate) mod registry;

pub use registry::{ApplyError, ClockPolicy, SaveError, Shape};

use crate::device::LoadError;

const MAGIC: &[u8; 8] = b"colostat";
/// Version of the frame around the sections.
const FORMAT: u16 = 1;
/// Longest section: a bound on what a damaged length can make us look at.
const LONGEST: u32 = 16 << 20;

/// Why a state was refused. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// Other bytes altogether.
    #[error("not a machine state: it begins with {got:02x?}, expected \"colostat\"")]
    Foreign {
        /// The first bytes.
        got: Vec<u8>,
    },
    /// The frame is of a later release.
    #[error("state format {got} is newer than {FORMAT}, the newest known here; update this host")]
    NewerFormat {
        /// Its version.
        got: u16,
    },
    /// It ends early.
    #[error("state ends early, after {at} bytes, in {what}")]
    Truncated {
        /// Where.
        at: usize,
        /// In what.
        what: &'static str,
    },
    /// Bytes behind the end, or a count that does not agree.
    #[error("state is damaged: {what}")]
    Malformed {
        /// What is wrong.
        what: &'static str,
    },
    /// A section was refused.
    #[error(transparent)]
    Section(#[from] LoadError),
    /// A section that this machine has no use for.
    #[error("section {section} has no owner here; give both machines the same devices and vCPUs")]
    Unknown {
        /// Its name.
        section: String,
    },
    /// A section that this machine needs.
    #[error("section {section} is missing; give both machines the same devices and vCPUs")]
    Missing {
        /// Its name.
        section: String,
    },
    /// A section that is there twice.
    #[error("section {section} is there twice")]
    Twice {
        /// Its name.
        section: String,
    },
}

/// Appends sections to a kept buffer.
#[derive(Debug)]
pub(crate) struct Writer<'a> {
    out: &'a mut Vec<u8>,
    count: u16,
}

impl<'a> Writer<'a> {
    /// Begins a state in `out`, which is emptied.
    pub(crate) fn new(out: &'a mut Vec<u8>) -> Self {
        out.clear();
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&FORMAT.to_le_bytes());
        Self { out, count: 0 }
    }

    /// Appends a section whose bytes `fill` appends.
    pub(crate) fn section<E>(
        &mut self,
        name: &str,
        version: u16,
        fill: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
    ) -> Result<(), E> {
        // Names are ours, a few letters long.
        let name = name.as_bytes();
        let name = name.get(..255).unwrap_or(name);
        self.out.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
        self.out.extend_from_slice(name);
        self.out.extend_from_slice(&version.to_le_bytes());
        let patch = self.out.len();
        self.out.extend_from_slice(&[0; 8]);
        let begin = self.out.len();
        fill(self.out)?;
        let len = u32::try_from(self.out.len() - begin).unwrap_or(u32::MAX);
        let crc = crc(
            name,
            version,
            len,
            self.out.get(begin..).unwrap_or_default(),
        );
        if let Some((length, sum)) = self
            .out
            .get_mut(patch..begin)
            .and_then(|head| head.split_at_mut_checked(4))
        {
            length.copy_from_slice(&len.to_le_bytes());
            sum.copy_from_slice(&crc.to_le_bytes());
        }
        self.count += 1;
        Ok(())
    }

    /// Ends the state.
    pub(crate) fn end(self) {
        self.out.push(0);
        self.out.extend_from_slice(&self.count.to_le_bytes());
    }
}

fn crc(name: &[u8], version: u16, len: u32, bytes: &[u8]) -> u32 {
    let sum = crc32c::crc32c(name);
    let sum = crc32c::crc32c_append(sum, &version.to_le_bytes());
    let sum = crc32c::crc32c_append(sum, &len.to_le_bytes());
    crc32c::crc32c_append(sum, bytes)
}

/// One section of a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Section<'a> {
    /// Whose it is.
    pub name: &'a str,
    /// Version of its bytes.
    pub version: u16,
    /// Its bytes.
    pub bytes: &'a [u8],
}

/// Takes a state apart and checks every CRC.
///
/// # Errors
///
/// [`StateError`] naming what is wrong where.
pub fn sections(state: &[u8]) -> Result<Vec<Section<'_>>, StateError> {
    let mut cursor = Cursor { all: state, at: 0 };
    let magic = state.get(..MAGIC.len()).unwrap_or(state);
    if magic != MAGIC {
        return Err(StateError::Foreign { got: magic.into() });
    }
    cursor.at = MAGIC.len();
    let format = u16::from_le_bytes(cursor.array("format")?);
    if format == 0 {
        return Err(StateError::Malformed {
            what: "its format is 0",
        });
    }
    if format > FORMAT {
        return Err(StateError::NewerFormat { got: format });
    }
    let mut all = Vec::new();
    loop {
        let [name_len] = cursor.array("name length")?;
        if name_len == 0 {
            break;
        }
        let name = cursor.bytes(name_len.into(), "name")?;
        let version = u16::from_le_bytes(cursor.array("version")?);
        let len = u32::from_le_bytes(cursor.array("length")?);
        let expected = u32::from_le_bytes(cursor.array("checksum")?);
        if len > LONGEST {
            return Err(StateError::Malformed {
                what: "a section claims to be longer than 16 MiB",
            });
        }
        let bytes = cursor.bytes(len as usize, "section")?;
        let got = crc(name, version, len, bytes);
        if got != expected {
            return Err(LoadError::Checksum {
                section: String::from_utf8_lossy(name).into_owned(),
                got,
                expected,
            }
            .into());
        }
        let name = std::str::from_utf8(name).map_err(|_| StateError::Malformed {
            what: "a section's name is not text",
        })?;
        if all.iter().any(|s: &Section<'_>| s.name == name) {
            return Err(StateError::Twice {
                section: name.into(),
            });
        }
        all.push(Section {
            name,
            version,
            bytes,
        });
    }
    let count = u16::from_le_bytes(cursor.array("end")?);
    if usize::from(count) != all.len() {
        return Err(StateError::Malformed {
            what: "the number of sections does not agree with the end mark",
        });
    }
    if cursor.at != state.len() {
        return Err(StateError::Malformed {
            what: "bytes follow the end mark",
        });
    }
    Ok(all)
}

struct Cursor<'a> {
    all: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn bytes(&mut self, len: usize, what: &'static str) -> Result<&'a [u8], StateError> {
        let end = self.at.checked_add(len);
        let got = end
            .and_then(|end| self.all.get(self.at..end))
            .ok_or(StateError::Truncated {
                at: self.all.len(),
                what,
            })?;
        self.at += len;
        Ok(got)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], StateError> {
        let mut out = [0; N];
        out.copy_from_slice(self.bytes(N, what)?);
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn sample() -> Vec<u8> {
        let mut out = b"old".to_vec();
        let mut writer = Writer::new(&mut out);
        for (name, bytes) in [("vcpu0", vec![1, 2, 3]), ("serial0", vec![])] {
            let Ok(()) = writer.section(name, 7, |out| {
                out.extend_from_slice(&bytes);
                Ok::<(), Infallible>(())
            });
        }
        writer.end();
        out
    }

    #[test]
    fn sections_come_back_as_written() {
        let state = sample();
        let all = sections(&state).unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].name, all[0].version), ("vcpu0", 7));
        assert_eq!(all[0].bytes, [1, 2, 3]);
        assert_eq!(all[1].bytes, []);
    }

    #[test]
    fn every_flipped_bit_is_an_error() {
        let state = sample();
        for bit in 0..state.len() * 8 {
            let mut damaged = state.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(sections(&damaged).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn every_cut_is_an_error_that_says_where() {
        let state = sample();
        for len in 0..state.len() {
            assert!(sections(&state[..len]).is_err(), "{len} bytes");
        }
        assert_eq!(
            sections(&state[..20]).unwrap_err().to_string(),
            "state ends early, after 20 bytes, in length"
        );
    }

    #[test]
    fn foreign_and_newer_bytes_are_named() {
        assert!(matches!(
            sections(b"QEVM..........").unwrap_err(),
            StateError::Foreign { .. }
        ));
        let mut newer = sample();
        newer[8] = 2;
        assert_eq!(
            sections(&newer).unwrap_err().to_string(),
            "state format 2 is newer than 1, the newest known here; update this host"
        );
    }

    #[test]
    fn bytes_behind_the_end_are_an_error() {
        let mut state = sample();
        state.push(0);
        assert!(matches!(
            sections(&state),
            Err(StateError::Malformed { .. })
        ));
    }
}
