//! The DSDT: what is on the board, in AML.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, AmlStr, Device, EISAName, IO, Interrupt, Memory32Fixed,
    Method, Name, Notify, Package, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;

use super::{OEM, OEM_TABLE, Platform, REVISION, low};
use crate::device::pci::HostBridge;
use crate::device::{Power, Rtc, Serial};
use crate::memory::layout::GENERATION_ID;
use crate::vm::MmioWindow;

/// COM1 of a PC.
const COM1: (u16, u32) = (0x3f8, 4);

pub(super) struct Dsdt(Sdt);

impl Aml for Dsdt {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(self.0.as_slice());
    }
}

pub(super) fn table(platform: &Platform<'_>) -> Dsdt {
    let mut body = Vec::new();
    board(&mut body);
    for (n, window) in platform.windows.iter().enumerate() {
        virtio(n, window, &mut body);
    }
    if let Some(bridge) = platform.bridge {
        root(bridge, &mut body);
    }
    generation(&mut body);
    power_off(&mut body);
    let mut sdt = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, REVISION);
    sdt.append_slice(&body);
    Dsdt(sdt)
}

/// Adds a device to the system bus. `name` has four letters.
fn device(name: &str, members: Vec<&dyn Aml>, out: &mut Vec<u8>) {
    let device = Device::new(name.into(), members);
    Scope::new("\\_SB_".into(), vec![&device]).to_aml_bytes(out);
}

/// Serial port, clock, and the ports that nobody else may use.
fn board(out: &mut Vec<u8>) {
    let id = |id| Name::new("_HID".into(), &EISAName::new(id));
    let ports = |at: u16, len: u64| IO::new(at, at, 1, len as u8);
    device(
        "COM1",
        vec![
            &id("PNP0501"),
            &Name::new("_UID".into(), &ZERO),
            &resources(vec![
                &ports(COM1.0, Serial::LEN),
                &Interrupt::new(true, true, false, false, COM1.1),
            ]),
        ],
        out,
    );
    device(
        "RTC0",
        vec![
            &id("PNP0B00"),
            &resources(vec![&ports(Rtc::BASE, Rtc::LEN.into())]),
        ],
        out,
    );
    device(
        "PWRB",
        vec![
            &id("PNP0C02"),
            &resources(vec![&ports(Power::BASE, Power::LEN.into())]),
        ],
        out,
    );
}

fn resources(all: Vec<&dyn Aml>) -> Name {
    Name::new("_CRS".into(), &ResourceTemplate::new(all))
}

fn virtio(n: usize, window: &MmioWindow, out: &mut Vec<u8>) {
    device(
        &format!("VR{n:02}"),
        vec![
            &Name::new("_HID".into(), &(AmlStr::from("LNRO0005"))),
            &Name::new("_UID".into(), &n),
            &Name::new("_CCA".into(), &1u8),
            &resources(vec![
                &Memory32Fixed::new(true, low(window.base), low(window.len)),
                &Interrupt::new(true, true, false, false, window.gsi),
            ]),
        ],
        out,
    );
}

/// The PCI root. Its functions have no interrupt pins, hence no routing table.
fn root(bridge: &HostBridge, out: &mut Vec<u8>) {
    let memory = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        low(bridge.memory.start),
        low(bridge.memory.end - 1),
        None,
    );
    device(
        "PCI0",
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_BBN".into(), &bridge.first_bus),
            &Name::new("_CCA".into(), &1u8),
            &resources(vec![
                &AddressSpace::<u16>::new_bus_number(
                    bridge.first_bus.into(),
                    bridge.last_bus.into(),
                ),
                &IO::new(0xcf8, 0xcf8, 1, 8),
                &memory,
            ]),
        ],
        out,
    );
    // A kernel uses ECAM only where the board says that the range is taken.
    device(
        "ECAM",
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &1u8),
            &resources(vec![&Memory32Fixed::new(
                true,
                low(bridge.ecam),
                low(bridge.ecam_len()),
            )]),
        ],
        out,
    );
}

/// The VM generation id, and the event that says it changed.
fn generation(out: &mut Vec<u8>) {
    let (low, high) = (low(GENERATION_ID), low(GENERATION_ID >> 32));
    device(
        "VGEN",
        vec![
            &Name::new("_HID".into(), &(AmlStr::from("VMGENCTR"))),
            &Name::new("_CID".into(), &(AmlStr::from("VM_Gen_Counter"))),
            &Name::new("_DDN".into(), &(AmlStr::from("VM_Gen_Counter"))),
            &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
        ],
        out,
    );
    let event = format!("_E{:02X}", Power::GENERATION_EVENT);
    let device = Path::new("\\_SB_.VGEN");
    let notify = Notify::new(&device, &0x80u8);
    let method = Method::new(event.as_str().into(), 0, false, vec![&notify]);
    Scope::new("\\_GPE".into(), vec![&method]).to_aml_bytes(out);
}

fn power_off(out: &mut Vec<u8>) {
    let kind = Power::OFF;
    Name::new(
        "_S5_".into(),
        &Package::new(vec![&kind, &kind, &ZERO, &ZERO]),
    )
    .to_aml_bytes(out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::pci::HOST_BRIDGE;

    #[test]
    fn every_device_is_on_the_board() {
        let window = MmioWindow {
            base: 0xd000_0000,
            len: 4096,
            gsi: 5,
        };
        let platform = Platform {
            vcpus: 1,
            windows: &[window],
            bridge: Some(&HOST_BRIDGE),
        };
        let mut bytes = Vec::new();
        table(&platform).to_aml_bytes(&mut bytes);
        let has = |what: &[u8]| bytes.windows(what.len()).any(|at| at == what);
        for name in [
            "COM1", "RTC0", "VR00", "PCI0", "VGEN", "_S5_", "_E05", "LNRO0005",
        ] {
            assert!(has(name.as_bytes()), "{name}");
        }
        // Memory32Fixed of the window, then its edge-triggered line 5.
        assert!(has(&[
            0x86, 9, 0, 1, 0, 0, 0, 0xd0, 0, 0x10, 0, 0, 0x89, 6, 0, 3, 1, 5
        ]));
    }
}
