//! The x86 memory map: RAM below and above the hole, devices inside it.
//!
//! ```text
//!  0            3 GiB          3.25 GiB                            4 GiB            4 GiB + rest
//!  ├── slot 0 ───┤               ├─ virtio-mmio, ECAM, BARs ─┤ APICs ├──── slot 1 ────┤
//!                └────────────────────── the hole ───────────────────┘
//! ```

use colo_proto::id::Slot;

use super::PAGE_SHIFT;

/// Where the hole begins: RAM below it is slot 0.
pub const HOLE_START: u64 = 0xc000_0000;
/// Where the hole ends: RAM from here on is slot 1.
pub const HOLE_END: u64 = 1 << 32;
/// First virtio-mmio window.
pub const MMIO_BASE: u64 = 0xd000_0000;
/// Bytes between two virtio-mmio windows.
pub const MMIO_STRIDE: u64 = 0x1000;
/// The local APIC.
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// The I/O APIC.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Where the VM generation id is: 16 bytes in the BIOS area, behind the ACPI tables.
pub const GENERATION_ID: u64 = 0xe_f000;
/// Three pages KVM needs on Intel to run real-mode code, with one page for an identity map below.
pub(crate) const TSS_BASE: u64 = 0xfffb_d000;
/// Slot of RAM below the hole.
pub const LOW: Slot = Slot(0);
/// Slot of RAM above the hole.
pub const HIGH: Slot = Slot(1);
/// First slot number for disks.
pub const FIRST_STORE: u16 = 16;
/// Least RAM: the boot protocols load at 1 MiB.
pub const LEAST: u64 = 2 << 20;

/// Lines for virtio-mmio devices, in the order they are handed out: none that the PIT, the
/// keyboard, the cascade, the serial ports, the clock or the power block sit on.
const LINES: [u32; 16] = [5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22];

/// Most virtio-mmio devices.
pub const MOST_MMIO: usize = LINES.len();

/// Why this much memory cannot be given to a guest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// Not whole pages.
    #[error("memory size {bytes:#x} is not a multiple of 4096: round it")]
    Unaligned {
        /// The size.
        bytes: u64,
    },
    /// Too little to boot.
    #[error("memory size {bytes:#x} is below {LEAST:#x}: give the guest at least 2 MiB")]
    TooSmall {
        /// The size.
        bytes: u64,
    },
    /// The processor cannot address it.
    #[error(
        "memory of {bytes:#x} bytes ends at guest address {end:#x}, but this host addresses only {bits} bits: give the guest less memory"
    )]
    TooLarge {
        /// The size.
        bytes: u64,
        /// Where it would end.
        end: u64,
        /// Physical address bits.
        bits: u32,
    },
}

/// One contiguous piece of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Its KVM slot.
    pub slot: Slot,
    /// Guest-physical address.
    pub base: u64,
    /// Length in pages.
    pub pages: u64,
}

impl Piece {
    /// Length in bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.pages << PAGE_SHIFT
    }

    /// First address behind it.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.base + self.bytes()
    }
}

/// Where a guest's RAM lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    pieces: Vec<Piece>,
}

impl Layout {
    /// RAM of `bytes` on a host that addresses `bits` bits.
    ///
    /// # Errors
    ///
    /// [`LayoutError`].
    pub fn new(bytes: u64, bits: u32) -> Result<Self, LayoutError> {
        if bytes & 0xfff != 0 {
            return Err(LayoutError::Unaligned { bytes });
        }
        if bytes < LEAST {
            return Err(LayoutError::TooSmall { bytes });
        }
        let mut pieces = vec![Piece {
            slot: LOW,
            base: 0,
            pages: bytes.min(HOLE_START) >> PAGE_SHIFT,
        }];
        if bytes > HOLE_START {
            let high = bytes - HOLE_START;
            let end = HOLE_END.saturating_add(high);
            if end > 1_u64.checked_shl(bits).unwrap_or(u64::MAX) {
                return Err(LayoutError::TooLarge { bytes, end, bits });
            }
            pieces.push(Piece {
                slot: HIGH,
                base: HOLE_END,
                pages: high >> PAGE_SHIFT,
            });
        }
        Ok(Self { pieces })
    }

    /// The pieces, low first.
    #[must_use]
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// First address behind the RAM below the hole.
    #[must_use]
    pub fn low_end(&self) -> u64 {
        self.pieces.first().map_or(0, Piece::end)
    }

    /// All RAM in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pieces.iter().map(Piece::bytes).sum()
    }
}

/// Window and interrupt line of the `n`th virtio-mmio device.
#[must_use]
pub fn mmio_window(n: usize) -> Option<(u64, u32)> {
    let line = *LINES.get(n)?;
    Some((MMIO_BASE + n as u64 * MMIO_STRIDE, line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_around_the_hole() {
        let small = Layout::new(128 << 20, 48).unwrap();
        assert_eq!(small.pieces().len(), 1);
        let exact = Layout::new(3 << 30, 48).unwrap();
        assert_eq!((exact.pieces().len(), exact.low_end()), (1, HOLE_START));
        let large = Layout::new(64 << 30, 48).unwrap();
        assert_eq!(large.bytes(), 64 << 30);
        assert_eq!(large.pieces()[1].base, HOLE_END);
        assert_eq!(large.pieces()[1].end(), 65 << 30);
    }

    #[test]
    fn a_bad_size_says_what_to_do() {
        let why = |bytes, bits| Layout::new(bytes, bits).unwrap_err().to_string();
        assert!(why((4 << 20) + 1, 48).ends_with("round it"));
        assert!(why(4096, 48).ends_with("give the guest at least 2 MiB"));
        assert!(why(64 << 30, 36).contains("addresses only 36 bits"));
    }

    #[test]
    fn windows_and_lines_are_distinct() {
        let mut lines: Vec<_> = (0..MOST_MMIO).map(|n| mmio_window(n).unwrap().1).collect();
        assert!(mmio_window(MOST_MMIO).is_none());
        assert!(mmio_window(MOST_MMIO - 1).unwrap().0 + MMIO_STRIDE < IOAPIC_BASE);
        lines.dedup();
        assert_eq!(lines.len(), MOST_MMIO);
        for taken in [0, 1, 2, 3, 4, 8, 9] {
            assert!(!lines.contains(&taken));
        }
    }
}
