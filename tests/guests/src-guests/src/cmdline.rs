//! The command line: words of the form `key=value`.

use crate::cpu;

const LIMIT: usize = 2048;

/// A copy of the loader's command line.
#[derive(Debug)]
pub struct CommandLine {
    text: [u8; LIMIT],
    used: usize,
}

impl CommandLine {
    /// Copies the zero-terminated text at a physical address; 0 means there is none.
    #[must_use]
    pub fn copy_from(address: u64) -> Self {
        let mut line = Self {
            text: [0; LIMIT],
            used: 0,
        };
        if address != 0 {
            while line.used < LIMIT {
                match cpu::peek8(address + line.used as u64) {
                    0 => break,
                    byte => line.text[line.used] = byte,
                }
                line.used += 1;
            }
        }
        line
    }

    /// The words, in order.
    pub fn words(&self) -> impl Iterator<Item = &str> {
        core::str::from_utf8(&self.text[..self.used])
            .unwrap_or("")
            .split_ascii_whitespace()
    }

    /// The value of the last `key=value`.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&str> {
        self.words()
            .filter_map(|word| word.split_once('='))
            .filter(|w| w.0 == key)
            .last()
            .map(|w| w.1)
    }

    /// The value of `key` as a number, decimal or `0x` hexadecimal.
    #[must_use]
    pub fn number(&self, key: &str) -> Option<u64> {
        parse_number(self.value(key)?)
    }
}

/// A decimal or `0x` hexadecimal number.
#[must_use]
pub fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}
