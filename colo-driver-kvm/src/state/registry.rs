//! Who owns which section, and the order in which they are saved and loaded.
//!
//! Save goes from the source of an interrupt to its sink: time, PIT, PIC and I/O APIC, LAPICs (in
//! the vCPU sections), after the devices are quiet. The PIT's timer cannot be stopped: if it fires
//! between two steps, its tick is found in the sink. The other order would lose it.
//!
//! Load goes the other way, from sink to source: loading the I/O APIC hands on what is pending in
//! it, which a LAPIC loaded later would forget. The clock comes after the vCPUs, whose MSRs say
//! where it is to be shown. Devices come last; they raise nothing before their resume.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use colo_proto::id::Slot;
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use zerocopy::IntoBytes;

use super::{Section, StateError, Writer, sections};
use crate::device::{Device, LoadError};
use crate::sys;
use crate::vcpu::Vcpus;
use crate::vcpu::state::{self as vcpu_state, Decoded, MsrBuffer, Pieces, VcpuStateError};

const MACHINE: &str = "machine";
const TIME: &str = "time";
const PIT: &str = "pit";
const IRQCHIP: &str = "irqchip";
/// Version of the sections above.
const VERSION: u16 = 1;
/// Largest difference between two hosts' TSC rates, in parts per million, that a guest does not
/// notice: crystals differ by about this much.
const TSC_PPM: u64 = 250;

/// Why the state of this machine could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuStateError),
    /// The VM.
    #[error("{call}: {source}")]
    Vm {
        /// The call.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// What both machines must have in common, as the state of one carries it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// How many vCPUs.
    pub vcpus: usize,
    /// Hash of the CPU they show.
    pub cpu: u64,
    /// TSC rate in kHz.
    pub tsc_khz: u32,
    /// Slots and their sizes in pages.
    pub slots: Vec<(Slot, u64)>,
}

/// All owners of sections.
pub(crate) struct Registry {
    shape: Shape,
    vcpu_names: Vec<String>,
    msrs: Vec<MsrBuffer>,
    devices: Vec<Attached>,
}

struct Attached {
    name: String,
    device: Arc<Mutex<dyn Device>>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let devices = self.devices.iter().map(|d| &d.name);
        f.debug_list().entries(devices).finish()
    }
}

/// A state that has been checked and can be applied.
pub(crate) struct Checked<'a> {
    clock: u64,
    tsc: Vec<u64>,
    pit: kvm_pit_state2,
    irqchips: [kvm_irqchip; 3],
    vcpus: Vec<Decoded>,
    devices: Vec<Section<'a>>,
}

const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

fn vm_call(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> SaveError {
    move |e| SaveError::Vm {
        call,
        source: e.into(),
    }
}

impl Registry {
    pub(crate) fn new(shape: Shape, msrs: Vec<MsrBuffer>) -> Self {
        Self {
            vcpu_names: (0..shape.vcpus).map(|id| format!("vcpu{id}")).collect(),
            shape,
            msrs,
            devices: Vec::new(),
        }
    }

    /// Numbers of the MSRs that a vCPU's state holds.
    pub(crate) fn msrs(&self) -> Vec<u32> {
        let first = self.msrs.first();
        first
            .map(|msrs| msrs.indices().collect())
            .unwrap_or_default()
    }

    pub(crate) fn shape(&self) -> &Shape {
        &self.shape
    }

    pub(crate) fn add_slot(&mut self, slot: Slot, pages: u64) {
        self.shape.slots.push((slot, pages));
        self.shape.slots.sort_by_key(|s| s.0);
    }

    /// Takes a device in and quiesces it, as the machine has not run: so the first resume is one for the device
    /// too, whether the guest was booted or loaded. The error is a section name that is taken or none.
    pub(crate) fn attach(&mut self, device: Arc<Mutex<dyn Device>>) -> Result<(), String> {
        let name = lock(&device).section().to_owned();
        let ours = [MACHINE, TIME, PIT, IRQCHIP];
        let taken = ours.contains(&name.as_str())
            || self.vcpu_names.contains(&name)
            || self.devices.iter().any(|d| d.name == name);
        if taken || name.is_empty() || name.len() > 64 {
            return Err(name);
        }
        lock(&device).quiesce();
        self.devices.push(Attached { name, device });
        Ok(())
    }

    pub(crate) fn quiesce(&self) {
        for attached in &self.devices {
            lock(&attached.device).quiesce();
        }
    }

    pub(crate) fn resume(&self) {
        for attached in &self.devices {
            lock(&attached.device).resume();
        }
    }

    /// Writes all sections of a stopped, quiet machine into `out`.
    pub(crate) fn save(
        &mut self,
        vm: &VmFd,
        vcpus: &Vcpus,
        out: &mut Vec<u8>,
    ) -> Result<(), SaveError> {
        let mut writer = Writer::new(out);
        writer.section(MACHINE, VERSION, |out| {
            self.shape.encode(out);
            Ok::<(), SaveError>(())
        })?;
        writer.section(TIME, VERSION, |out| save_time(vm, vcpus, out))?;
        writer.section(PIT, VERSION, |out| {
            let mut pit = vm.get_pit2().map_err(vm_call("KVM_GET_PIT2"))?;
            for channel in &mut pit.channels {
                // A time of this host's clock. KVM starts the count anew when it is set.
                channel.count_load_time = 0;
            }
            out.extend_from_slice(pit.as_bytes());
            Ok::<(), SaveError>(())
        })?;
        writer.section(IRQCHIP, VERSION, |out| {
            for chip_id in CHIPS {
                let mut chip = kvm_irqchip {
                    chip_id,
                    ..Default::default()
                };
                vm.get_irqchip(&mut chip)
                    .map_err(vm_call("KVM_GET_IRQCHIP"))?;
                out.extend_from_slice(chip.as_bytes());
            }
            Ok::<(), SaveError>(())
        })?;
        for (id, (name, msrs)) in self.vcpu_names.iter().zip(&mut self.msrs).enumerate() {
            if let Some(fd) = vcpus.fd(id) {
                writer.section(name, vcpu_state::VERSION, |out| {
                    vcpu_state::save(id, &fd, msrs, out)
                })?;
            }
        }
        for attached in &self.devices {
            let device = lock(&attached.device);
            writer.section(&attached.name, device.version(), |out| {
                device.save(out);
                Ok::<(), SaveError>(())
            })?;
        }
        writer.end();
        Ok(())
    }

    /// Checks a state against this machine, to the last field. Changes nothing.
    pub(crate) fn check<'a>(&self, state: &'a [u8]) -> Result<Checked<'a>, StateError> {
        let all = sections(state)?;
        let missing = |name: &str| StateError::Missing {
            section: name.into(),
        };
        let find = |name: &str| {
            let found = all.iter().find(|s| s.name == name);
            found.copied().ok_or_else(|| missing(name))
        };
        let find_ours = |name: &str, newest: u16| {
            let section = find(name)?;
            if section.version > newest {
                return Err(LoadError::Newer {
                    section: name.into(),
                    got: section.version,
                    newest,
                }
                .into());
            }
            if section.version == 0 {
                return Err(StateError::Malformed {
                    what: "a section of version 0",
                });
            }
            Ok(section.bytes)
        };
        self.shape.check(find_ours(MACHINE, VERSION)?)?;

        let mut pieces = Pieces::new(TIME, find_ours(TIME, VERSION)?);
        let clock = pieces.take("clock")?;
        let tsc = (0..self.shape.vcpus)
            .map(|_| pieces.take("TSC"))
            .collect::<Result<_, _>>()?;
        pieces.end()?;

        let mut pieces = Pieces::new(PIT, find_ours(PIT, VERSION)?);
        let pit = pieces.take("channels")?;
        pieces.end()?;

        let mut pieces = Pieces::new(IRQCHIP, find_ours(IRQCHIP, VERSION)?);
        let mut irqchips = [kvm_irqchip::default(); 3];
        for (chip, chip_id) in irqchips.iter_mut().zip(CHIPS) {
            *chip = pieces.take("chip")?;
            if chip.chip_id != chip_id {
                return Err(LoadError::Invalid {
                    section: IRQCHIP.into(),
                    field: "chip",
                    got: chip.chip_id.into(),
                    expected: "master, slave, I/O APIC in this order",
                }
                .into());
            }
        }
        pieces.end()?;

        let vcpus = self
            .vcpu_names
            .iter()
            .zip(&self.msrs)
            .map(|(name, msrs)| {
                let bytes = find_ours(name, vcpu_state::VERSION)?;
                Ok(vcpu_state::decode(name, msrs, bytes)?)
            })
            .collect::<Result<_, StateError>>()?;

        let mut devices = Vec::new();
        for attached in &self.devices {
            let section = find(&attached.name)?;
            lock(&attached.device).check(section.version, section.bytes)?;
            devices.push(section);
        }

        let known = |name: &str| {
            [MACHINE, TIME, PIT, IRQCHIP].contains(&name)
                || self.vcpu_names.iter().any(|n| n == name)
                || self.devices.iter().any(|d| d.name == name)
        };
        if let Some(section) = all.iter().find(|s| !known(s.name)) {
            return Err(StateError::Unknown {
                section: section.name.into(),
            });
        }
        Ok(Checked {
            clock,
            tsc,
            pit,
            irqchips,
            vcpus,
            devices,
        })
    }

    /// Makes a stopped, quiet machine what a checked state says.
    pub(crate) fn apply(
        &self,
        vm: &VmFd,
        vcpus: &Vcpus,
        state: &Checked<'_>,
    ) -> Result<(), ApplyError> {
        // One reading for all vCPUs: their TSCs keep their distance.
        let host_tsc = sys::host_tsc();
        for (id, (decoded, tsc)) in state.vcpus.iter().zip(&state.tsc).enumerate() {
            if let Some(fd) = vcpus.fd(id) {
                vcpu_state::load(id, &fd, decoded, *tsc, host_tsc).map_err(SaveError::from)?;
            }
        }
        for chip in &state.irqchips {
            vm.set_irqchip(chip).map_err(vm_call("KVM_SET_IRQCHIP"))?;
        }
        vm.set_pit2(&state.pit).map_err(vm_call("KVM_SET_PIT2"))?;
        let clock = kvm_clock_data {
            clock: state.clock,
            ..Default::default()
        };
        vm.set_clock(&clock).map_err(vm_call("KVM_SET_CLOCK"))?;
        for (attached, section) in self.devices.iter().zip(&state.devices) {
            lock(&attached.device).load(section.version, section.bytes)?;
        }
        Ok(())
    }
}

/// A checked state was refused on the way in: the machine is neither old nor new.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// By KVM.
    #[error("{0}; the machine is half loaded and must not run")]
    Kvm(#[from] SaveError),
    /// By a device that had accepted it.
    #[error("{0}; the machine is half loaded and must not run")]
    Device(#[from] LoadError),
}

fn save_time(vm: &VmFd, vcpus: &Vcpus, out: &mut Vec<u8>) -> Result<(), SaveError> {
    let host_tsc = sys::host_tsc();
    let clock = vm.get_clock().map_err(vm_call("KVM_GET_CLOCK"))?;
    out.extend_from_slice(&clock.clock.to_le_bytes());
    for id in 0..vcpus.len() {
        if let Some(fd) = vcpus.fd(id) {
            let offset = sys::tsc_offset(&*fd).map_err(|source| SaveError::Vm {
                call: "get TSC offset",
                source,
            })?;
            out.extend_from_slice(&host_tsc.wrapping_add(offset).to_le_bytes());
        }
    }
    Ok(())
}

fn lock(device: &Mutex<dyn Device>) -> std::sync::MutexGuard<'_, dyn Device + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shape {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&u32::try_from(self.vcpus).unwrap_or(u32::MAX).to_le_bytes());
        out.extend_from_slice(&self.cpu.to_le_bytes());
        out.extend_from_slice(&self.tsc_khz.to_le_bytes());
        let slots = u32::try_from(self.slots.len()).unwrap_or(u32::MAX);
        out.extend_from_slice(&slots.to_le_bytes());
        for (slot, pages) in &self.slots {
            out.extend_from_slice(&slot.0.to_le_bytes());
            out.extend_from_slice(&pages.to_le_bytes());
        }
    }

    fn check(&self, bytes: &[u8]) -> Result<(), LoadError> {
        let mut pieces = Pieces::new(MACHINE, bytes);
        let differs = |field, got: u64, here: u64| LoadError::Shape {
            section: MACHINE.into(),
            field,
            got,
            here,
        };
        let same = |field, got: u64, here: u64| {
            if got == here {
                Ok(())
            } else {
                Err(differs(field, got, here))
            }
        };
        same(
            "number of vCPUs",
            pieces.take::<u32>("vCPUs")?.into(),
            self.vcpus as u64,
        )?;
        same("hash of the CPU model", pieces.take("CPU")?, self.cpu)?;
        let khz: u32 = pieces.take("TSC rate")?;
        let allowed = u64::from(self.tsc_khz) * TSC_PPM / 1_000_000;
        if u64::from(khz.abs_diff(self.tsc_khz)) > allowed {
            return Err(differs("TSC rate in kHz", khz.into(), self.tsc_khz.into()));
        }
        let slots = pieces.take::<u32>("slots")?;
        same("number of slots", slots.into(), self.slots.len() as u64)?;
        for (slot, pages) in &self.slots {
            same("slot", pieces.take::<u16>("slot")?.into(), slot.0.into())?;
            same("slot's pages", pieces.take("slot's pages")?, *pages)?;
        }
        pieces.end()
    }
}
