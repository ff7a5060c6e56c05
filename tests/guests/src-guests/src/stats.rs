//! The page of counters at guest-physical 0x1000, for the host to read.

use core::ptr;

/// Where the page is.
pub const ADDRESS: u64 = 0x1000;

/// The words of the page, each a little-endian `u64` at `ADDRESS + 8 * index`.
#[derive(Debug, Clone, Copy)]
#[repr(usize)]
pub enum Word {
    /// What the guest makes progress in: iterations, requests, sectors.
    Progress = 0,
    /// Pages, bytes or generations written.
    Written = 1,
    /// Self-checks that failed.
    Errors = 2,
    /// Self-checks made.
    Verified = 3,
    /// `COLO` and the kind of guest in ASCII; set last when a guest starts, so that its presence
    /// says that the other words count.
    Magic = 4,
    /// Microseconds since the start, as of the last update.
    Micros = 5,
}

/// Sets a word.
pub fn set(word: Word, value: u64) {
    let place = (ADDRESS as *mut u64).wrapping_add(word as usize);
    // SAFETY: the page is mapped, aligned, and nothing else lives in it.
    unsafe { ptr::write_volatile(place, value) };
}

/// Clears the page and names the guest.
pub fn begin(kind: &[u8; 4]) {
    for word in [
        Word::Progress,
        Word::Written,
        Word::Errors,
        Word::Verified,
        Word::Micros,
    ] {
        set(word, 0);
    }
    let [a, b, c, d] = *kind;
    set(
        Word::Magic,
        u64::from_le_bytes([b'C', b'O', b'L', b'O', a, b, c, d]),
    );
}
