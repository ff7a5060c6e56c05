//! The description of the device sections: just enough JSON to know the size of each
//! (spec qemu 8).

use alloc::vec::Vec;

use thiserror::Error;

use super::item::Name;

/// Deepest nesting that is followed; real descriptions stay below 20.
const DEEPEST: u32 = 64;
/// Most devices in a description.
const MOST_DEVICES: usize = 4096;

/// One device as described.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    /// Its name.
    pub name: Name,
    /// Which of the devices of this name.
    pub instance: u32,
    /// Version of its state; devices of the old style do not say.
    pub version: Option<u32>,
    /// Length of its state in bytes.
    pub size: u64,
}

/// A description that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("byte {at} of the description: expected {expected}")]
#[non_exhaustive]
pub struct DescriptionError {
    /// Byte offset within the JSON text.
    pub at: usize,
    /// What should have stood there.
    pub expected: &'static str,
}

/// The devices of a description, in stream order, with the sizes that it gives them.
///
/// # Errors
/// Where the text stops being a description.
pub fn describe(json: &[u8]) -> Result<Vec<Described>, DescriptionError> {
    let mut text = Text {
        bytes: json,
        at: 0,
        depth: 0,
    };
    let mut devices = None;
    text.object(|text, key| match key {
        b"devices" => {
            let mut all = Vec::new();
            text.array(|text| {
                if all.len() == MOST_DEVICES {
                    return Err(text.expected("at most 4096 devices"));
                }
                all.push(device(text)?);
                Ok(())
            })?;
            devices = Some(all);
            Ok(())
        }
        b"page_size" => match text.number()? {
            4096 => Ok(()),
            _ => Err(text.expected("a page size of 4096")),
        },
        _ => text.skip(),
    })?;
    text.space();
    if text.at != json.len() {
        return Err(text.expected("the end"));
    }
    devices.ok_or_else(|| text.expected("a list of devices"))
}

fn device(text: &mut Text<'_>) -> Result<Described, DescriptionError> {
    let (mut name, mut instance, mut version, mut opaque) = (None, None, None, None);
    let (mut structured, mut state) = (false, 0u64);
    text.object(|text, key| {
        match key {
            b"name" => name = Name::new(text.string()?),
            b"instance_id" => instance = u32::try_from(text.number()?).ok(),
            b"version" => version = u32::try_from(text.number()?).ok(),
            b"size" => opaque = Some(text.number()?),
            b"vmsd_name" => {
                text.string()?;
                structured = true;
            }
            b"fields" => state = text.sum(state, fields)?,
            b"subsections" => state = text.sum(state, subsections)?,
            _ => text.skip()?,
        }
        Ok(())
    })?;
    let size = if structured { Some(state) } else { opaque };
    match (name, instance, size) {
        (Some(name), Some(instance), Some(size)) => Ok(Described {
            name,
            instance,
            version,
            size,
        }),
        _ => Err(text.expected("a device with a name, an instance and a size")),
    }
}

fn fields(text: &mut Text<'_>) -> Result<u64, DescriptionError> {
    let mut total = 0u64;
    text.array(|text| {
        let (mut size, mut times) = (0u64, 1u64);
        text.object(|text, key| {
            match key {
                b"size" => size = text.number()?,
                b"array_len" => times = text.number()?,
                _ => text.skip()?,
            }
            Ok(())
        })?;
        let field = size.checked_mul(times);
        total = field
            .and_then(|field| total.checked_add(field))
            .ok_or_else(|| text.expected("sizes that fit 64 bits"))?;
        Ok(())
    })?;
    Ok(total)
}

/// Each subsection stands on the wire as type, name, version, state.
fn subsections(text: &mut Text<'_>) -> Result<u64, DescriptionError> {
    let mut total = 0u64;
    text.array(|text| {
        text.object(|text, key| {
            total = match key {
                b"vmsd_name" => {
                    let name = text.string()?.len() as u64;
                    total.saturating_add(1 + 1 + name + 4)
                }
                b"fields" => text.sum(total, fields)?,
                b"subsections" => text.sum(total, subsections)?,
                _ => {
                    text.skip()?;
                    total
                }
            };
            Ok(())
        })
    })?;
    Ok(total)
}

/// A position in a JSON text.
struct Text<'a> {
    bytes: &'a [u8],
    at: usize,
    depth: u32,
}

type Parsed<T> = Result<T, DescriptionError>;

impl<'a> Text<'a> {
    fn expected(&self, expected: &'static str) -> DescriptionError {
        DescriptionError {
            at: self.at,
            expected,
        }
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\n' | b'\r' | b'\t')) {
            self.at += 1;
        }
    }

    /// Takes `byte` if it is next after white space.
    fn eat(&mut self, byte: u8) -> bool {
        self.space();
        let is = self.peek() == Some(byte);
        self.at += usize::from(is);
        is
    }

    fn must(&mut self, byte: u8, expected: &'static str) -> Parsed<()> {
        if self.eat(byte) {
            Ok(())
        } else {
            Err(self.expected(expected))
        }
    }

    /// A string as it stands in the text. One with an escape is only good for skipping.
    fn string(&mut self) -> Parsed<&'a [u8]> {
        self.must(b'"', "a string")?;
        let from = self.at;
        loop {
            match self.peek() {
                Some(b'"') => break,
                Some(b'\\') => self.at += 2,
                Some(_) => self.at += 1,
                None => return Err(self.expected("the end of a string")),
            }
        }
        let text = self.bytes.get(from..self.at).unwrap_or_default();
        self.at += 1;
        Ok(text)
    }

    fn number(&mut self) -> Parsed<u64> {
        self.space();
        let from = self.at;
        let mut value = 0u64;
        while let Some(digit @ b'0'..=b'9') = self.peek() {
            value = value
                .checked_mul(10)
                .and_then(|v| v.checked_add(u64::from(digit - b'0')))
                .ok_or_else(|| self.expected("a number that fits 64 bits"))?;
            self.at += 1;
        }
        if self.at == from {
            return Err(self.expected("a number"));
        }
        Ok(value)
    }

    fn deeper(&mut self) -> Parsed<()> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err(self.expected("at most 64 levels"));
        }
        Ok(())
    }

    fn object(&mut self, mut member: impl FnMut(&mut Self, &'a [u8]) -> Parsed<()>) -> Parsed<()> {
        self.must(b'{', "an object")?;
        self.deeper()?;
        if !self.eat(b'}') {
            loop {
                let key = self.string()?;
                self.must(b':', "a colon")?;
                member(self, key)?;
                if !self.eat(b',') {
                    break;
                }
            }
            self.must(b'}', "the end of an object")?;
        }
        self.depth -= 1;
        Ok(())
    }

    fn array(&mut self, mut element: impl FnMut(&mut Self) -> Parsed<()>) -> Parsed<()> {
        self.must(b'[', "a list")?;
        self.deeper()?;
        if !self.eat(b']') {
            loop {
                element(self)?;
                if !self.eat(b',') {
                    break;
                }
            }
            self.must(b']', "the end of a list")?;
        }
        self.depth -= 1;
        Ok(())
    }

    /// Any value.
    fn skip(&mut self) -> Parsed<()> {
        self.space();
        match self.peek() {
            Some(b'{') => self.object(|text, _| text.skip()),
            Some(b'[') => self.array(Self::skip),
            Some(b'"') => self.string().map(|_| ()),
            Some(b'-' | b'0'..=b'9' | b'a'..=b'z') => {
                while matches!(
                    self.peek(),
                    Some(b'-' | b'+' | b'.' | b'0'..=b'9' | b'a'..=b'z' | b'E')
                ) {
                    self.at += 1;
                }
                Ok(())
            }
            _ => Err(self.expected("a value")),
        }
    }

    fn sum(&mut self, total: u64, part: impl FnOnce(&mut Self) -> Parsed<u64>) -> Parsed<u64> {
        let part = part(self)?;
        total
            .checked_add(part)
            .ok_or_else(|| self.expected("sizes that fit 64 bits"))
    }
}

#[cfg(test)]
mod tests {
    use alloc::{format, string::String};

    use super::*;

    #[test]
    fn sizes_follow_from_fields_arrays_and_subsections() {
        let json = br#"{"page_size": 4096, "devices": [
            {"name": "timer", "instance_id": 0, "vmsd_name": "timer", "version": 2, "fields": [
                {"name": "a", "type": "int64", "size": 8},
                {"name": "b", "array_len": 3, "type": "uint32", "size": 4},
                {"name": "c", "type": "struct", "struct": {"vmsd_name": "x", "version": 1,
                    "fields": [{"name": "d", "type": "bool", "size": 1}]}, "size": 1}],
             "subsections": [{"vmsd_name": "timer/icount", "version": 1, "fields": [
                {"name": "e", "type": "int64", "size": 8}]}]},
            {"name": "slirp", "instance_id": 1, "size": 20, "fields": [
                {"name": "data", "size": 20, "type": "buffer"}]}]}"#;
        let devices = describe(json).unwrap();
        let sizes: Vec<_> = devices.iter().map(|d| (d.size, d.version)).collect();
        let subsection = 1 + 1 + 12 + 4 + 8;
        assert_eq!(sizes, [(8 + 12 + 1 + subsection, Some(2)), (20, None)]);
    }

    #[test]
    fn what_is_no_description_is_refused_where_it_stops_being_one() {
        for (json, at) in [
            ("", 0),
            ("{}", 2),
            (r#"{"devices":[{}]}"#, 14),
            (r#"{"devices":[]} x"#, 15),
            (r#"{"devices":[{"name":"a"#, 22),
            (r#"{"page_size":8192,"devices":[]}"#, 17),
            (
                r#"{"devices":[{"name":"a","instance_id":0,"size":99999999999999999999}]}"#,
                66,
            ),
        ] {
            assert_eq!(describe(json.as_bytes()).unwrap_err().at, at, "{json}");
        }
        let deep: String = (0..100).map(|_| "{\"a\":").collect();
        assert_eq!(
            describe(format!("{{\"x\":{deep}").as_bytes())
                .unwrap_err()
                .expected,
            "at most 64 levels"
        );
    }
}
