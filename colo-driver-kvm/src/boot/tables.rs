//! Tables the processor or the kernel looks for: GDT, MP table; and the registers at entry.

use std::io;

use kvm_bindings::kvm_segment;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::IntoBytes;

use super::BootError;
use super::params::BASE_END;
use crate::memory::GuestRam;
use crate::memory::layout::{IOAPIC_BASE, LAPIC_BASE};
use crate::state::SaveError;
use crate::vm::Vm;

const GDT: u64 = 0x500;
/// Selectors as Linux's 32-bit boot protocol names them.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
/// Two empty entries, then flat code and data.
const DESCRIPTORS: [u64; 4] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Registers that differ between the kinds of kernels; the others are zero.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Entry {
    pub(super) rip: u64,
    pub(super) rax: u64,
    pub(super) rbx: u64,
    pub(super) rsi: u64,
}

pub(super) fn gdt(ram: &GuestRam) -> Result<(), BootError> {
    Ok(ram.write_slice(DESCRIPTORS.as_bytes(), GuestAddress(GDT))?)
}

fn flat(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

impl Vm {
    /// Points the first vCPU at a kernel: 32-bit protected mode, flat segments, no paging. The
    /// others wait for their start-up interrupt.
    pub(crate) fn enter_at(&mut self, entry: Entry) -> Result<(), SaveError> {
        let failed = |call| {
            move |e: kvm_ioctls::Error| SaveError::Vm {
                call,
                source: e.into(),
            }
        };
        let Some(fd) = self.vcpus.fd(0) else {
            return Err(SaveError::Vm {
                call: "find the first vCPU",
                source: io::ErrorKind::NotFound.into(),
            });
        };
        let mut sregs = fd.get_sregs().map_err(failed("get special registers"))?;
        sregs.cs = flat(CODE, 11);
        let data = flat(DATA, 3);
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        (sregs.fs, sregs.gs) = (data, data);
        sregs.gdt.base = GDT;
        sregs.gdt.limit = u16::try_from(size_of_val(&DESCRIPTORS) - 1).unwrap_or(0);
        sregs.idt.base = 0;
        sregs.idt.limit = 0;
        // Protection on, and the bit that says a coprocessor is there.
        sregs.cr0 = 0x11;
        sregs.cr4 = 0;
        sregs.efer = 0;
        fd.set_sregs(&sregs)
            .map_err(failed("set special registers"))?;
        let regs = kvm_bindings::kvm_regs {
            rip: entry.rip,
            rax: entry.rax,
            rbx: entry.rbx,
            rsi: entry.rsi,
            // Reserved bit 1; interrupts are off.
            rflags: 2,
            ..Default::default()
        };
        fd.set_regs(&regs).map_err(failed("set registers"))
    }
}

/// Writes an Intel MP table (specification 1.4) in the last KiB of base memory, where kernels look:
/// processors, one bus, one I/O APIC, its sixteen ISA lines and the rest one to one.
pub(super) fn mp(ram: &GuestRam, vcpus: usize) -> Result<(), BootError> {
    const LAPIC_VERSION: u8 = 0x14;
    const IOAPIC_VERSION: u8 = 0x11;
    const FEATURES: u32 = 0x0201; // APIC, FPU
    const PINS: u8 = 24;
    const CASCADE: u8 = 2;

    let vcpus = u8::try_from(vcpus).unwrap_or(u8::MAX);
    let ioapic_id = vcpus;
    let lapic = u32::try_from(LAPIC_BASE).unwrap_or(0);
    let ioapic = u32::try_from(IOAPIC_BASE).unwrap_or(0);

    let mut entries = Vec::new();
    let mut count = 0u16;
    for id in 0..vcpus {
        let flags = if id == 0 { 0b11 } else { 0b01 };
        entries.extend_from_slice(&[0, id, LAPIC_VERSION, flags]);
        entries.extend_from_slice(&0x0600u32.to_le_bytes());
        entries.extend_from_slice(&FEATURES.to_le_bytes());
        entries.extend_from_slice(&[0; 8]);
        count += 1;
    }
    entries.extend_from_slice(&[1, 0]);
    entries.extend_from_slice(b"ISA   ");
    entries.extend_from_slice(&[2, ioapic_id, IOAPIC_VERSION, 1]);
    entries.extend_from_slice(&ioapic.to_le_bytes());
    count += 2;
    for pin in 0..PINS {
        // KVM wires every line to the pin of its number, the PIT's too. Nothing is at the cascade's.
        if pin == CASCADE {
            continue;
        }
        entries.extend_from_slice(&[3, 0, 0, 0, 0, pin, ioapic_id, pin]);
        count += 1;
    }
    // The PIC's output, and NMI, at the LAPICs.
    entries.extend_from_slice(&[4, 3, 0, 0, 0, 0, 0, 0]);
    entries.extend_from_slice(&[4, 1, 0, 0, 0, 0, 0xff, 1]);
    count += 2;

    let mut table = b"PCMP".to_vec();
    let len = u16::try_from(44 + entries.len()).unwrap_or(u16::MAX);
    table.extend_from_slice(&len.to_le_bytes());
    table.extend_from_slice(&[4, 0]);
    table.extend_from_slice(b"COLO    VM          ");
    table.extend_from_slice(&[0; 6]);
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&lapic.to_le_bytes());
    table.extend_from_slice(&[0; 4]);
    table.extend_from_slice(&entries);
    seal(&mut table, 7);

    let at = u32::try_from(BASE_END + 16).unwrap_or(0);
    let mut pointer = b"_MP_".to_vec();
    pointer.extend_from_slice(&at.to_le_bytes());
    pointer.extend_from_slice(&[1, 4, 0, 0, 0, 0, 0, 0]);
    seal(&mut pointer, 10);

    ram.write_slice(&pointer, GuestAddress(BASE_END))?;
    ram.write_slice(&table, GuestAddress(BASE_END + 16))?;
    Ok(())
}

/// Makes all bytes sum up to zero.
fn seal(table: &mut [u8], at: usize) {
    let sum = table.iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
    if let Some(check) = table.get_mut(at) {
        *check = 0u8.wrapping_sub(sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mp_table_is_where_kernels_look_and_sums_to_zero() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        mp(&ram, 8).unwrap();
        let mut all = [0u8; 1024];
        ram.read_slice(&mut all, GuestAddress(0x9_fc00)).unwrap();
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |s, b| s.wrapping_add(*b));
        assert_eq!(&all[..4], b"_MP_");
        assert_eq!(sum(&all[..16]), 0);
        let table = &all[16..];
        assert_eq!(&table[..4], b"PCMP");
        let len = usize::from(u16::from_le_bytes([table[4], table[5]]));
        assert!(16 + len <= 1024, "it stays within its KiB");
        assert_eq!(sum(&table[..len]), 0);
        let entries = u16::from_le_bytes([table[34], table[35]]);
        assert_eq!(entries, 8 + 2 + 23 + 2);
        // The PIT: line 0 of bus 0 at pin 0 of the I/O APIC, as KVM routes it.
        let ioapic = 8;
        let has = |entry: &[u8]| table[..len].windows(8).any(|at| at == entry);
        assert!(has(&[3, 0, 0, 0, 0, 0, ioapic, 0]));
        assert!(!has(&[3, 0, 0, 0, 0, 0, ioapic, 2]));
    }
}
