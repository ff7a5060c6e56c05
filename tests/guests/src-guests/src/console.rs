//! COM1 as a console: writes only, sixteen bytes per look at the status register.

use core::fmt::{self, Write};

use crate::cpu::{in8, out8};

const COM1: u16 = 0x3F8;
const FIFO: usize = 16;

/// Sets 115200 8N1, FIFOs on, no interrupts.
pub fn init() {
    for (register, value) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 3), (2, 7), (4, 3)] {
        out8(COM1 + register, value);
    }
}

/// The console as a formatter's target.
#[derive(Debug)]
pub struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for chunk in text.as_bytes().chunks(FIFO) {
            // A host that does not drain its end may not hang the guest.
            for _ in 0..10_000 {
                if in8(COM1 + 5) & 0x20 != 0 {
                    break;
                }
            }
            for &byte in chunk {
                out8(COM1, byte);
            }
        }
        Ok(())
    }
}

/// A line, put together first: one burst on the wire instead of a piece per argument.
#[derive(Debug)]
pub struct Line {
    text: [u8; 256],
    used: usize,
}

impl Line {
    /// An empty line.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            text: [0; 256],
            used: 0,
        }
    }

    /// Sends the line, cut at 256 bytes, and ends it.
    pub fn send(&mut self) {
        let text = core::str::from_utf8(&self.text[..self.used]).unwrap_or("(not text)");
        let _ = Console.write_str(text);
        let _ = Console.write_str("\r\n");
    }
}

impl Default for Line {
    fn default() -> Self {
        Self::new()
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            if let Some(place) = self.text.get_mut(self.used) {
                // Cutting at a byte must not cut a character.
                *place = if byte.is_ascii() { byte } else { b'?' };
                self.used += 1;
            }
        }
        Ok(())
    }
}

/// Prints a line on the console.
#[macro_export]
macro_rules! println {
    ($($argument:tt)*) => {{
        let mut line = $crate::console::Line::new();
        let _ = core::fmt::Write::write_fmt(&mut line, format_args!($($argument)*));
        line.send();
    }};
}
