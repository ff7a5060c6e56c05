//! The bytes of a device's state section: little-endian fields, then a CRC-32C over name, version and fields.
//!
//! The CRC is what turns a flipped bit in a field that may hold anything (a ring index, an address) into an error.

use super::LoadError;

/// Writes a section's fields; [`seal`](Self::seal) ends it.
#[derive(Debug)]
pub(crate) struct Encoder<'a> {
    section: &'a str,
    version: u16,
    start: usize,
    out: &'a mut Vec<u8>,
}

impl<'a> Encoder<'a> {
    pub(crate) fn new(section: &'a str, version: u16, out: &'a mut Vec<u8>) -> Self {
        Self {
            section,
            version,
            start: out.len(),
            out,
        }
    }

    pub(crate) fn u8(&mut self, value: u8) {
        self.out.push(value);
    }

    pub(crate) fn bool(&mut self, value: bool) {
        self.out.push(u8::from(value));
    }

    pub(crate) fn u16(&mut self, value: u16) {
        self.out.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.out.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.out.extend_from_slice(&value.to_le_bytes());
    }

    /// Bytes whose number the reader knows.
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    pub(crate) fn seal(self) {
        let fields = self.out.get(self.start..).unwrap_or_default();
        let crc = checksum(self.section, self.version, fields);
        self.out.extend_from_slice(&crc.to_le_bytes());
    }
}

/// Reads a section's fields; [`end`](Self::end) insists that nothing is left.
#[derive(Debug)]
pub(crate) struct Decoder<'a> {
    section: &'a str,
    rest: &'a [u8],
}

impl<'a> Decoder<'a> {
    /// Checks version and CRC first: fields of damaged sections are never looked at.
    pub(crate) fn open(
        section: &'a str,
        newest: u16,
        version: u16,
        bytes: &'a [u8],
    ) -> Result<Self, LoadError> {
        if version > newest {
            return Err(LoadError::Newer {
                section: section.into(),
                got: version,
                newest,
            });
        }
        if version == 0 {
            return Err(LoadError::Invalid {
                section: section.into(),
                field: "version",
                got: 0,
                expected: "1 or more",
            });
        }
        let Some((fields, crc)) = bytes.split_last_chunk::<4>() else {
            return Err(LoadError::Truncated {
                section: section.into(),
                field: "checksum",
                missing: 4 - bytes.len(),
            });
        };
        let expected = u32::from_le_bytes(*crc);
        let got = checksum(section, version, fields);
        if got != expected {
            return Err(LoadError::Checksum {
                section: section.into(),
                got,
                expected,
            });
        }
        Ok(Self {
            section,
            rest: fields,
        })
    }

    pub(crate) fn raw(&mut self, field: &'static str, len: usize) -> Result<&'a [u8], LoadError> {
        let Some((head, rest)) = self.rest.split_at_checked(len) else {
            return Err(LoadError::Truncated {
                section: self.section.into(),
                field,
                missing: len - self.rest.len(),
            });
        };
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], LoadError> {
        let mut array = [0; N];
        array.copy_from_slice(self.raw(field, N)?);
        Ok(array)
    }

    pub(crate) fn u8(&mut self, field: &'static str) -> Result<u8, LoadError> {
        Ok(u8::from_le_bytes(self.array(field)?))
    }

    pub(crate) fn bool(&mut self, field: &'static str) -> Result<bool, LoadError> {
        match self.u8(field)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(self.invalid(field, other.into(), "0 or 1")),
        }
    }

    pub(crate) fn u16(&mut self, field: &'static str) -> Result<u16, LoadError> {
        Ok(u16::from_le_bytes(self.array(field)?))
    }

    pub(crate) fn u32(&mut self, field: &'static str) -> Result<u32, LoadError> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    pub(crate) fn u64(&mut self, field: &'static str) -> Result<u64, LoadError> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    /// The error for a value out of its range.
    pub(crate) fn invalid(
        &self,
        field: &'static str,
        got: u64,
        expected: &'static str,
    ) -> LoadError {
        LoadError::Invalid {
            section: self.section.into(),
            field,
            got,
            expected,
        }
    }

    /// Refuses a value that must be the same here, because the machines were made alike.
    pub(crate) fn same(&self, field: &'static str, got: u64, here: u64) -> Result<(), LoadError> {
        if got == here {
            return Ok(());
        }
        Err(LoadError::Shape {
            section: self.section.into(),
            field,
            got,
            here,
        })
    }

    pub(crate) fn end(self) -> Result<(), LoadError> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(LoadError::Trailing {
            section: self.section.into(),
            extra: self.rest.len(),
        })
    }
}

fn checksum(section: &str, version: u16, fields: &[u8]) -> u32 {
    let crc = crc32c::crc32c(section.as_bytes());
    let crc = crc32c::crc32c_append(crc, &version.to_le_bytes());
    crc32c::crc32c_append(crc, fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut out = b"before".to_vec();
        let mut encoder = Encoder::new("thing0", 3, &mut out);
        encoder.u8(1);
        encoder.u16(2);
        encoder.u32(3);
        encoder.u64(4);
        encoder.bool(true);
        encoder.raw(b"abc");
        encoder.seal();
        out.split_off(6)
    }

    #[test]
    fn fields_come_back_as_written() {
        let bytes = sample();
        let mut decoder = Decoder::open("thing0", 3, 3, &bytes).unwrap();
        assert_eq!(decoder.u8("a").unwrap(), 1);
        assert_eq!(decoder.u16("b").unwrap(), 2);
        assert_eq!(decoder.u32("c").unwrap(), 3);
        assert_eq!(decoder.u64("d").unwrap(), 4);
        assert!(decoder.bool("e").unwrap());
        assert_eq!(decoder.raw("f", 3).unwrap(), b"abc");
        decoder.end().unwrap();
    }

    #[test]
    fn every_flipped_bit_is_an_error() {
        let bytes = sample();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let error = Decoder::open("thing0", 3, 3, &damaged).unwrap_err();
            assert!(
                matches!(error, LoadError::Checksum { .. }),
                "bit {bit}: {error}"
            );
        }
    }

    #[test]
    fn another_name_or_version_is_an_error() {
        let bytes = sample();
        assert!(matches!(
            Decoder::open("thing1", 3, 3, &bytes),
            Err(LoadError::Checksum { .. })
        ));
        assert!(matches!(
            Decoder::open("thing0", 3, 2, &bytes),
            Err(LoadError::Checksum { .. })
        ));
        assert_eq!(
            Decoder::open("thing0", 3, 4, &bytes)
                .unwrap_err()
                .to_string(),
            "section thing0: version 4 is newer than 3, the newest known here; update this host"
        );
        assert!(matches!(
            Decoder::open("thing0", 3, 0, &bytes),
            Err(LoadError::Invalid {
                field: "version",
                ..
            })
        ));
    }

    #[test]
    fn short_and_long_sections_say_where() {
        let bytes = sample();
        assert!(matches!(
            Decoder::open("thing0", 3, 3, &bytes[..3]),
            Err(LoadError::Truncated {
                field: "checksum",
                missing: 1,
                ..
            })
        ));
        let mut decoder = Decoder::open("thing0", 3, 3, &bytes).unwrap();
        assert!(matches!(
            decoder.raw("body", 21),
            Err(LoadError::Truncated {
                field: "body",
                missing: 2,
                ..
            })
        ));
        assert!(matches!(
            decoder.end(),
            Err(LoadError::Trailing { extra: 19, .. })
        ));
    }
}
