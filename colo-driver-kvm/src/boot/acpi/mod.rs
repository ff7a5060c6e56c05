//! ACPI tables: how a kernel finds processors, interrupts, devices and the power switch by itself.
//!
//! | table | says |
//! |---|---|
//! | RSDP, XSDT | where the others are |
//! | FADT, FACS | the power block of `device/power`, the reset command of the keyboard controller |
//! | MADT | local APICs, the I/O APIC, the line of the power block |
//! | MCFG | the PCI host bridge's configuration space, if there is one |
//! | DSDT | serial port, clock, virtio-mmio windows, PCI root, generation id, S5 |
//!
//! They lie in the BIOS area, which the memory map reserves and where a kernel looks for the RSDP. They describe
//! the machine as it was configured; nothing in them changes while it runs.

mod dsdt;

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes as _, GuestAddress};
use zerocopy::{Immutable, IntoBytes};

use super::BootError;
use crate::device::pci::HostBridge;
use crate::device::{I8042, Power, Rtc};
use crate::memory::GuestRam;
use crate::memory::layout::{GENERATION_ID, IOAPIC_BASE, LAPIC_BASE};
use crate::vm::MmioWindow;

/// Where the tables begin, with the RSDP: a multiple of 16 in the BIOS area.
pub(super) const BASE: u64 = 0xe_0000;
const OEM: [u8; 6] = *b"COLO  ";
const OEM_TABLE: [u8; 8] = *b"COLOVM  ";
const REVISION: u32 = 1;

/// What the tables describe.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Platform<'a> {
    /// Processors, with APIC ids from 0 on.
    pub(crate) vcpus: usize,
    /// virtio-mmio devices.
    pub(crate) windows: &'a [MmioWindow],
    /// The PCI host bridge, if the machine has one.
    pub(crate) bridge: Option<&'a HostBridge>,
}

/// Writes the tables. Returns the address of the RSDP.
pub(super) fn write(ram: &GuestRam, platform: &Platform<'_>) -> Result<u64, BootError> {
    let bytes = tables(platform, BASE);
    let end = BASE + bytes.len() as u64;
    if end > GENERATION_ID {
        return Err(BootError::NoRoom {
            what: "the set of ACPI tables",
            start: BASE,
            end,
        });
    }
    ram.write_slice(&bytes, GuestAddress(BASE))?;
    Ok(BASE)
}

/// All tables as they are from address `base` on, the RSDP first.
pub(crate) fn tables(platform: &Platform<'_>, base: u64) -> Vec<u8> {
    let mut all = vec![0; Rsdp::len()];
    let mut put = |table: &dyn Aml| {
        all.resize(all.len().next_multiple_of(64), 0);
        let at = base + all.len() as u64;
        table.to_aml_bytes(&mut all);
        at
    };
    let facs = put(&FACS::new());
    let dsdt = put(&dsdt::table(platform));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    xsdt.add_entry(put(&fadt(facs, dsdt)));
    xsdt.add_entry(put(&madt(platform.vcpus)));
    if let Some(bridge) = platform.bridge {
        let mut mcfg = MCFG::new(OEM, OEM_TABLE, REVISION);
        mcfg.add_ecam(bridge.ecam, 0, bridge.first_bus, bridge.last_bus);
        xsdt.add_entry(put(&mcfg));
    }
    let xsdt = put(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    for (to, from) in all.iter_mut().zip(rsdp) {
        *to = from;
    }
    all
}

/// Addresses here are below 4 GiB by construction.
fn low(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(u32::MAX)
}

fn port(at: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, at.into())
}

fn fadt(facs: u64, dsdt: u64) -> impl Aml {
    /// There are devices on the LPC bus; there is no VGA. No keyboard to look for.
    const LEGACY: u16 = 1 << 0;
    const NO_VGA: u16 = 1 << 2;
    /// A latency that says: no such sleep state.
    const NEVER: u16 = u16::MAX;

    let mut table = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .firmware_ctrl_32(low(facs))
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // The power button is a fixed one (its flag is down), a sleep button does not exist.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup)
        .gpe_info(Power::GPE.into(), 0, 2, 0, 0);
    table.dsdt = low(dsdt).into();
    table.sci_int = u16::try_from(Power::LINE).unwrap_or(0).into();
    table.pm1a_evt_blk = u32::from(Power::EVENTS).into();
    table.pm1_evt_len = 4;
    table.pm1a_cnt_blk = u32::from(Power::CONTROL).into();
    table.pm1_cnt_len = 2;
    table.p_lvl2_lat = NEVER.into();
    table.p_lvl3_lat = NEVER.into();
    table.century = Rtc::CENTURY;
    table.iapc_boot_arch = (LEGACY | NO_VGA).into();
    table.reset_reg = port(I8042::COMMAND, 8, AccessSize::ByteAccess);
    table.reset_value = I8042::RESET;
    table.x_pm1a_evt_blk = port(Power::EVENTS, 32, AccessSize::WordAccess);
    table.x_pm1a_cnt_blk = port(Power::CONTROL, 16, AccessSize::WordAccess);
    table.x_gpe0_blk = port(Power::GPE, 16, AccessSize::ByteAccess);
    table.finalize()
}

fn madt(vcpus: usize) -> MADT {
    let lapic = LocalInterruptController::Address(low(LAPIC_BASE));
    let mut madt = MADT::new(OEM, OEM_TABLE, REVISION, lapic);
    for id in 0..u8::try_from(vcpus).unwrap_or(u8::MAX) {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, low(IOAPIC_BASE), 0));
    madt.add_structure(Override::edge(Power::LINE));
    madt.add_structure(Nmi {
        kind: 4,
        length: 6,
        processor: 0xff,
        flags: [0; 2],
        pin: 1,
    });
    madt
}

/// Interrupt source override (ACPI 6.5, 5.2.12.5), which the crate lacks.
#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Override {
    kind: u8,
    length: u8,
    bus: u8,
    source: u8,
    gsi: [u8; 4],
    flags: [u8; 2],
}

impl Override {
    /// A line at the same pin, but edge-triggered and active high: an eventfd has no level to hold.
    fn edge(line: u32) -> Self {
        Self {
            kind: 2,
            length: 10,
            bus: 0,
            source: u8::try_from(line).unwrap_or(0),
            gsi: line.to_le_bytes(),
            flags: [0b0101, 0],
        }
    }
}

/// Non-maskable interrupts at the local APICs (5.2.12.7).
#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Nmi {
    kind: u8,
    length: u8,
    processor: u8,
    flags: [u8; 2],
    pin: u8,
}

impl Aml for Override {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(self.as_bytes());
    }
}

impl Aml for Nmi {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(self.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::pci::HOST_BRIDGE;
    use crate::memory::layout::mmio_window;

    fn windows(count: usize) -> Vec<MmioWindow> {
        let window = |n| {
            let (base, gsi) = mmio_window(n).unwrap();
            MmioWindow {
                base,
                len: 4096,
                gsi,
            }
        };
        (0..count).map(window).collect()
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, b| sum.wrapping_add(*b))
    }

    /// As a kernel reads them: by address, from guest memory.
    struct Tables(Vec<u8>);

    impl Tables {
        fn of(vcpus: usize, mmio: usize, bridge: Option<&HostBridge>) -> Self {
            let platform = Platform {
                vcpus,
                windows: &windows(mmio),
                bridge,
            };
            let ram = GuestRam::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
            assert_eq!(write(&ram, &platform).unwrap(), BASE);
            let mut all = vec![0; 2 << 20];
            ram.read_slice(&mut all, GuestAddress(0)).unwrap();
            Self(all)
        }

        fn word<const N: usize>(&self, at: usize) -> u64 {
            let mut word = [0; 8];
            word[..N].copy_from_slice(&self.0[at..at + N]);
            u64::from_le_bytes(word)
        }

        /// A table with its header, checked.
        fn at(&self, at: u64) -> &[u8] {
            let at = usize::try_from(at).unwrap();
            let len = usize::try_from(self.word::<4>(at + 4)).unwrap();
            let table = &self.0[at..at + len];
            assert_eq!(sum(table), 0, "{:?}", &table[..4]);
            table
        }

        fn named(&self, name: &[u8; 4]) -> Option<&[u8]> {
            let rsdp = usize::try_from(BASE).unwrap();
            let xsdt = self.at(self.word::<8>(rsdp + 24));
            let (entries, rest) = xsdt[36..].as_chunks::<8>();
            assert!(rest.is_empty());
            entries
                .iter()
                .map(|entry| self.at(u64::from_le_bytes(*entry)))
                .find(|table| table.starts_with(name))
        }
    }

    #[test]
    fn a_kernel_that_searches_the_bios_area_finds_every_table_whole() {
        let tables = Tables::of(2, 3, Some(&HOST_BRIDGE));
        let found = (0xe_0000..0x10_0000)
            .step_by(16)
            .find(|at| tables.0[*at..].starts_with(b"RSD PTR "));
        let rsdp = found.unwrap();
        assert_eq!(sum(&tables.0[rsdp..rsdp + 20]), 0);
        assert_eq!(sum(&tables.0[rsdp..rsdp + 36]), 0);
        for name in [b"FACP", b"APIC", b"MCFG"] {
            assert!(tables.named(name).is_some(), "{name:?}");
        }
        assert!(Tables::of(1, 0, None).named(b"MCFG").is_none());
    }

    #[test]
    fn the_fadt_leads_to_dsdt_facs_and_the_power_block() {
        let tables = Tables::of(1, 1, None);
        let fadt = tables.named(b"FACP").unwrap();
        let long = |at: usize| u32::from_le_bytes(fadt[at..at + 4].try_into().unwrap());
        let dsdt = u64::from(long(40));
        assert_eq!(u64::from_le_bytes(fadt[140..148].try_into().unwrap()), dsdt);
        assert!(tables.at(dsdt).starts_with(b"DSDT"));
        let facs = usize::try_from(long(36)).unwrap();
        assert_eq!(facs % 64, 0);
        assert!(tables.0[facs..].starts_with(b"FACS"));
        assert_eq!(u16::from_le_bytes([fadt[46], fadt[47]]), 9, "SCI");
        assert_eq!((long(56), long(64)), (0x600, 0x604));
        // No 8042 and no VGA to look for; there is a clock.
        assert_eq!(u16::from_le_bytes([fadt[109], fadt[110]]), 0b101);
        assert_eq!(long(112) & 1 << 4, 0, "a fixed power button");
        // Reset: port 0x64, one byte, 0xfe.
        assert_eq!(fadt[116], 1);
        assert_eq!((fadt[120], fadt[128]), (0x64, 0xfe));
    }

    #[test]
    fn the_madt_names_every_processor_the_io_apic_and_the_edge_of_the_power_line() {
        let tables = Tables::of(4, 0, None);
        let madt = tables.named(b"APIC").unwrap();
        let mut rest = &madt[44..];
        let mut entries = Vec::new();
        while let [kind, len, ..] = *rest {
            entries.push((kind, &rest[2..usize::from(len)]));
            rest = &rest[usize::from(len)..];
        }
        let of = |kind: u8| entries.iter().filter(move |e| e.0 == kind);
        let ids: Vec<_> = of(0).map(|e| (e.1[0], e.1[1], e.1[2])).collect();
        assert_eq!(ids, [(0, 0, 1), (1, 1, 1), (2, 2, 1), (3, 3, 1)]);
        assert_eq!(of(1).count(), 1);
        let overrides: Vec<_> = of(2).map(|e| e.1.to_vec()).collect();
        assert_eq!(overrides, [[0, 9, 9, 0, 0, 0, 0b0101, 0]]);
    }

    #[test]
    fn tables_of_the_largest_machine_leave_the_generation_id_alone() {
        let all = tables(
            &Platform {
                vcpus: 255,
                windows: &windows(crate::memory::layout::MOST_MMIO),
                bridge: Some(&HOST_BRIDGE),
            },
            BASE,
        );
        assert!(BASE + (all.len() as u64) < GENERATION_ID);
    }
}
