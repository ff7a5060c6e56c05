//! The instructions that Rust has no word for.

use core::arch::asm;
use core::arch::x86_64::_rdtsc;

/// The time-stamp counter.
#[must_use]
pub fn tsc() -> u64 {
    // SAFETY: reads a counter.
    unsafe { _rdtsc() }
}

/// Reads a byte from an I/O port.
#[must_use]
pub fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: the guest owns every port of its machine.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) };
    value
}

/// Writes a byte to an I/O port.
pub fn out8(port: u16, value: u8) {
    // SAFETY: the guest owns every port of its machine.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) };
}

/// Reads a 32-bit word from an I/O port.
#[must_use]
pub fn in32(port: u16) -> u32 {
    let value;
    // SAFETY: the guest owns every port of its machine.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack)) };
    value
}

/// Writes a 32-bit word to an I/O port.
pub fn out32(port: u16, value: u32) {
    // SAFETY: the guest owns every port of its machine.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)) };
}

/// Reads a naturally aligned 16-bit word at a physical address below 4 GiB.
#[must_use]
pub fn peek16(address: u64) -> u16 {
    let value;
    // SAFETY: everything below 4 GiB is mapped; `mov` keeps device registers to one access.
    unsafe { asm!("mov {0:x}, [{1}]", out(reg) value, in(reg) address, options(nostack)) };
    value
}

/// Writes a naturally aligned 16-bit word at a physical address below 4 GiB, as [`poke32`] does.
pub fn poke16(address: u64, value: u16) {
    // SAFETY: everything below 4 GiB is mapped; `mov` keeps device registers to one access.
    unsafe { asm!("mov [{1}], {0:x}", in(reg) value, in(reg) address, options(nostack)) };
}

/// Writes a byte at a physical address below 4 GiB, as [`poke32`] does.
pub fn poke8(address: u64, value: u8) {
    // SAFETY: everything below 4 GiB is mapped; `mov` keeps device registers to one access.
    unsafe { asm!("mov [{1}], {0}", in(reg_byte) value, in(reg) address, options(nostack)) };
}

/// Reads a naturally aligned 32-bit word at a physical address below 4 GiB.
#[must_use]
pub fn peek32(address: u64) -> u32 {
    let value;
    // SAFETY: everything below 4 GiB is mapped; `mov` keeps device registers to one access.
    unsafe { asm!("mov {0:e}, [{1}]", out(reg) value, in(reg) address, options(nostack)) };
    value
}

/// Writes a naturally aligned 32-bit word at a physical address below 4 GiB.
///
/// The caller names device registers or memory that no Rust object occupies.
pub fn poke32(address: u64, value: u32) {
    // SAFETY: everything below 4 GiB is mapped; `mov` keeps device registers to one access.
    unsafe { asm!("mov [{1}], {0:e}", in(reg) value, in(reg) address, options(nostack)) };
}

/// Reads a 64-bit word in two halves.
#[must_use]
pub fn peek64(address: u64) -> u64 {
    u64::from(peek32(address)) | u64::from(peek32(address + 4)) << 32
}

/// Reads a byte.
#[must_use]
pub fn peek8(address: u64) -> u8 {
    let value;
    // SAFETY: everything below 4 GiB is mapped.
    unsafe { asm!("mov {0}, [{1}]", out(reg_byte) value, in(reg) address, options(nostack)) };
    value
}

/// Halts until the next timer or device interrupt; returns at once if one came since
/// [`crate::interrupts::clear_wake`].
pub(crate) fn halt() {
    // SAFETY: the gate is installed before main runs; it preserves every register.
    unsafe { asm!("int3") };
}

/// Stops for good, without spinning.
pub fn stop() -> ! {
    loop {
        crate::interrupts::clear_wake();
        halt();
    }
}
