//! Values as a person writes them: `"100ms"`, `"128M"`, `"52:54:00:12:34:56"`.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// Gives a type that is written as a string its serde halves.
macro_rules! as_string {
    ($($type:ty),+) => {$(
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                String::deserialize(from)?.parse().map_err(D::Error::custom)
            }
        }
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(self)
            }
        }
    )+};
}

as_string!(Span, Size, Mac, Hex);

/// The serde halves of a type of another crate that is written as a string.
pub(super) mod string {
    use std::{fmt::Display, str::FromStr};

    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(in crate::config) fn deserialize<'de, D, T>(from: D) -> Result<T, D::Error>
    where
        D: Deserializer<'de>,
        T: FromStr<Err: Display>,
    {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }

    pub(in crate::config) fn serialize<S: Serializer, T: Display>(
        value: &T,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.collect_str(value)
    }
}

/// A length of time: a whole number and `us`, `ms`, `s` or `min`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span(pub Duration);

impl Span {
    /// So many milliseconds.
    #[must_use]
    pub const fn from_millis(ms: u64) -> Self {
        Self(Duration::from_millis(ms))
    }
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, unit) = split_unit(text);
        let micros = match unit {
            "us" => 1,
            "ms" => 1_000,
            "s" => 1_000_000,
            "min" => 60_000_000,
            _ => 0,
        };
        number
            .parse::<u64>()
            .ok()
            .filter(|_| micros != 0)
            .and_then(|n| n.checked_mul(micros))
            .map(|us| Self(Duration::from_micros(us)))
            .ok_or_else(|| {
                format!("\"{text}\" is no duration, expected a number with us, ms, s or min, such as \"100ms\"")
            })
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let us = self.0.as_micros();
        if us.is_multiple_of(1_000_000) {
            write!(f, "{}s", us / 1_000_000)
        } else if us.is_multiple_of(1_000) {
            write!(f, "{}ms", us / 1_000)
        } else {
            write!(f, "{us}us")
        }
    }
}

/// A number of bytes: a whole number, alone or with `K`, `M` or `G` (powers of 1,024).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Size(pub u64);

impl Size {
    /// So many mebibytes.
    #[must_use]
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, unit) = split_unit(text);
        let factor = match unit {
            "" => Some(1u64),
            "K" | "KiB" => Some(1 << 10),
            "M" | "MiB" => Some(1 << 20),
            "G" | "GiB" => Some(1 << 30),
            _ => None,
        };
        factor
            .and_then(|factor| number.parse::<u64>().ok()?.checked_mul(factor))
            .map(Self)
            .ok_or_else(|| {
                format!("\"{text}\" is no size, expected a number of bytes, or one with K, M or G, such as \"512M\"")
            })
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            n if n != 0 && n.is_multiple_of(1 << 30) => write!(f, "{}G", n >> 30),
            n if n != 0 && n.is_multiple_of(1 << 20) => write!(f, "{}M", n >> 20),
            n if n != 0 && n.is_multiple_of(1 << 10) => write!(f, "{}K", n >> 10),
            n => write!(f, "{n}"),
        }
    }
}

fn split_unit(text: &str) -> (&str, &str) {
    let text = text.trim();
    let at = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    (number, unit.trim_start())
}

/// A hardware address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || {
            format!(
                "\"{text}\" is no hardware address, expected six pairs of digits such as \"52:54:00:12:34:56\""
            )
        };
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts
                .next()
                .filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))
                .ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() {
            return Err(bad());
        }
        if mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(format!(
                "\"{text}\" is a group address or zero; one card needs an address of its own, such as \"52:54:00:12:34:56\""
            ));
        }
        Ok(Self(mac))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Sixteen bytes, written as 32 hexadecimal digits: the identity of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hex(pub [u8; 16]);

impl FromStr for Hex {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.replace('-', "");
        if digits.len() != 32 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(format!(
                "\"{text}\" is no pair id, expected 32 hexadecimal digits, as uuidgen prints them"
            ));
        }
        u128::from_str_radix(&digits, 16)
            .map(|n| Self(n.to_be_bytes()))
            .map_err(|error| error.to_string())
    }
}

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

#[cfg(test)]
mod tests {
    use colo_driver_mio::Endpoint;

    use super::*;

    #[test]
    fn what_is_written_is_what_is_printed() {
        for text in ["100ms", "2s", "250us"] {
            assert_eq!(text.parse::<Span>().unwrap().to_string(), text);
        }
        for text in ["128M", "4G", "64K", "17"] {
            assert_eq!(text.parse::<Size>().unwrap().to_string(), text);
        }
        for text in ["192.0.2.1:7800", "[2001:db8::1]:7800", "unix:/run/x"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
        let mac = "52:54:00:12:34:56";
        assert_eq!(mac.parse::<Mac>().unwrap().to_string(), mac);
        let id = "6f1ed002ab5595859014ebf0951522d9";
        assert_eq!(id.parse::<Hex>().unwrap().to_string(), id);
        assert_eq!(
            "6f1ed002-ab55-9585-9014-ebf0951522d9".parse::<Hex>(),
            id.parse()
        );
    }

    #[test]
    fn a_bad_value_is_refused_with_an_example() {
        for text in [
            "",
            "100",
            "ms",
            "-1ms",
            "1.5s",
            "1h",
            "99999999999999999999s",
        ] {
            let error = text.parse::<Span>().unwrap_err();
            assert!(error.contains("such as \"100ms\""), "{text}: {error}");
        }
        for text in ["", "M", "1T", "-1", "99999999999G"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        for text in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "g2:54:00:12:34:56",
            "+1:54:00:12:34:56x",
        ] {
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
        assert!(
            "01:00:5e:00:00:01"
                .parse::<Mac>()
                .unwrap_err()
                .contains("group")
        );
        assert!("localhost".parse::<Endpoint>().is_err());
        assert!("unix:".parse::<Endpoint>().is_err());
        assert!("+0000000000000000000000000000001".parse::<Hex>().is_err());
    }
}
