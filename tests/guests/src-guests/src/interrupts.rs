//! Descriptor table, local APIC, I/O APIC; exceptions as a line on the console.

use core::ptr;

use crate::cpu::{self, out8, peek32, poke32};
use crate::println;

const LAPIC: u64 = 0xFEE0_0000;
const LAPIC_ID: u64 = LAPIC + 0x20;
const LAPIC_TPR: u64 = LAPIC + 0x80;
const LAPIC_SVR: u64 = LAPIC + 0xF0;
const LAPIC_LVT_TIMER: u64 = LAPIC + 0x320;
const LAPIC_LVT_LINT0: u64 = LAPIC + 0x350;
const LAPIC_LVT_LINT1: u64 = LAPIC + 0x360;
const LAPIC_TIMER_INITIAL: u64 = LAPIC + 0x380;
const LAPIC_TIMER_CURRENT: u64 = LAPIC + 0x390;
const LAPIC_TIMER_DIVIDE: u64 = LAPIC + 0x3E0;
const MASKED: u32 = 1 << 16;

/// The I/O APIC every machine has.
pub const IOAPIC: u64 = 0xFEC0_0000;

const VECTOR_TIMER: u8 = 0x40;
const VECTOR_DEVICE: u8 = 0x41;
/// The breakpoint, `int3`: the one software interrupt that every host delivers from ring 3 (some
/// answer `int n` with an invalid opcode).
const VECTOR_HALT: u8 = 3;
const VECTOR_SPURIOUS: u8 = 0xFF;

unsafe extern "C" {
    static mut idt: [[u64; 2]; 256];
    static mut wake_pending: u8;
    static fault_handlers: [u64; 32];
    static fault_vector: u64;
    static fault_code: u64;
    static fault_rip: u64;
    static fault_address: u64;
    fn on_wake();
    fn on_halt();
    fn on_spurious();
}

/// Fills the descriptor table, silences the PICs, enables this processor's APIC.
pub(crate) fn install() {
    // SAFETY: a constant table in the image.
    let faults = unsafe { fault_handlers };
    for (vector, &handler) in (0u8..).zip(&faults) {
        gate(vector, handler, 0);
    }
    gate(VECTOR_TIMER, on_wake as *const () as u64, 0);
    gate(VECTOR_DEVICE, on_wake as *const () as u64, 0);
    gate(VECTOR_HALT, on_halt as *const () as u64, 3);
    gate(VECTOR_SPURIOUS, on_spurious as *const () as u64, 0);

    // Both PICs are moved off the exceptions' vectors before they are masked: a spurious
    // interrupt is not stopped by the mask.
    for (port, value) in [
        (0x20, 0x11),
        (0xA0, 0x11),
        (0x21, 0x20),
        (0xA1, 0x28),
        (0x21, 4),
        (0xA1, 2),
        (0x21, 1),
        (0xA1, 1),
        (0x21, 0xFF),
        (0xA1, 0xFF),
    ] {
        out8(port, value);
    }
    for vector in 0x20..0x30 {
        gate(vector, on_spurious as *const () as u64, 0);
    }
    enable_lapic();
}

fn enable_lapic() {
    poke32(LAPIC_SVR, 0x100 | u32::from(VECTOR_SPURIOUS));
    poke32(LAPIC_TPR, 0);
    poke32(LAPIC_LVT_LINT0, MASKED);
    poke32(LAPIC_LVT_LINT1, MASKED);
    poke32(LAPIC_TIMER_DIVIDE, 0b1011);
    poke32(LAPIC_LVT_TIMER, VECTOR_TIMER.into());
}

/// An interrupt gate of privilege level `from` into ring 0.
fn gate(vector: u8, handler: u64, from: u64) {
    let low = handler & 0xFFFF
        | 0x08 << 16
        | (0x8E00 | from << 13) << 32
        | (handler >> 16 & 0xFFFF) << 48;
    // SAFETY: the table has an entry for every vector; the processor reads it as memory.
    unsafe {
        ptr::write_volatile(
            (&raw mut idt[usize::from(vector)]).cast(),
            [low, handler >> 32],
        );
    }
}

/// Sends a pin of an I/O APIC to this processor, edge triggered, as a device interrupt.
///
/// Edges suffice for virtio-mmio, also where its line is a level: the driver acknowledges, which
/// lowers the line, before it looks at the rings.
pub fn route(ioapic: u64, pin: u32) {
    let destination = peek32(LAPIC_ID) & 0xFF00_0000;
    poke32(ioapic, 0x11 + 2 * pin);
    poke32(ioapic + 0x10, destination);
    poke32(ioapic, 0x10 + 2 * pin);
    poke32(ioapic + 0x10, VECTOR_DEVICE.into());
}

/// Address and data of the message that is a device interrupt on this processor.
#[must_use]
pub fn message() -> (u32, u32) {
    let id = peek32(LAPIC_ID) >> 24;
    (LAPIC as u32 | id << 12, VECTOR_DEVICE.into())
}

/// The number of pins of an I/O APIC, or none if there is no I/O APIC at that address.
#[must_use]
pub fn pins(ioapic: u64) -> Option<u32> {
    poke32(ioapic, 1);
    let version = peek32(ioapic + 0x10);
    (version != u32::MAX && version & 0xFF >= 0x11).then_some((version >> 16 & 0xFF) + 1)
}

/// Forgets the wake-ups so far: whoever calls this looks at every device and clock afterwards.
pub(crate) fn clear_wake() {
    set_wake(0);
}

/// Lets interrupts in, for good.
pub(crate) fn enable() {
    // The gate opens them; with a wake-up pending it does not halt.
    set_wake(1);
    cpu::halt();
    set_wake(0);
}

fn set_wake(value: u8) {
    // SAFETY: one byte, otherwise only written by the handler.
    unsafe { ptr::write_volatile(&raw mut wake_pending, value) };
}

/// Starts this processor's timer, once, for `count` of its ticks; 0 stops it.
pub(crate) fn timer_set(count: u32) {
    poke32(LAPIC_TIMER_INITIAL, count);
}

/// What is left of the timer's count.
pub(crate) fn timer_left() -> u32 {
    peek32(LAPIC_TIMER_CURRENT)
}

/// Where the exception handlers in `boot.S` end, back in ring 3.
#[unsafe(no_mangle)]
extern "C" fn guest_fault() -> ! {
    // SAFETY: words that the handler wrote before it came here.
    let (vector, code, rip, address) =
        unsafe { (fault_vector, fault_code, fault_rip, fault_address) };
    println!("guest: FAULT vector={vector} code={code:#x} rip={rip:#x} cr2={address:#x}");
    cpu::stop()
}
