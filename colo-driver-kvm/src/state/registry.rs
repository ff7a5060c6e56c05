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
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    kvm_clock_data, kvm_irqchip, kvm_pit_state2,
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
/// Version of the time: 2 has the wall clock.
const TIME_VERSION: u16 = 2;
/// A way between two hosts that took longer, or less than nothing, is a difference between their wall clocks.
const FARTHEST: u64 = 2_000_000_000;

/// What a guest's clocks do while it is nowhere: between the capture of a checkpoint and the moment in which it goes on
/// from there, after a takeover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClockPolicy {
    /// Wall and monotonic clock go on by the time that was lost: the wall clock stays right.
    #[default]
    Step,
    /// They go on where they stood: no timer sees a jump, and the wall clock is behind.
    GoOn,
}
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
    power_on: Option<PowerOn>,
    clock: ClockPolicy,
    /// What the clocks showed in the state that was loaded last, if they are to go on from there at the resume.
    frozen: Option<Frozen>,
}

struct Frozen {
    clock: u64,
    tsc: Vec<u64>,
    vcpus: Vec<Decoded>,
}

/// What is not devices, before anything ran.
struct PowerOn {
    vcpus: Vec<Decoded>,
    pit: kvm_pit_state2,
    irqchips: [kvm_irqchip; 3],
}

struct Attached {
    name: String,
    device: Arc<Mutex<dyn Device>>,
    /// What it saved before the guest first ran.
    power_on: Option<Vec<u8>>,
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
    /// The wall clock at that moment, in ns; 0 if it is not known.
    realtime: u64,
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
    pub(crate) fn new(shape: Shape, msrs: Vec<MsrBuffer>, clock: ClockPolicy) -> Self {
        Self {
            vcpu_names: (0..shape.vcpus).map(|id| format!("vcpu{id}")).collect(),
            shape,
            msrs,
            devices: Vec::new(),
            power_on: None,
            clock,
            frozen: None,
        }
    }

    /// Numbers of the MSRs that a vCPU's state holds.
    pub(crate) fn msrs(&self) -> Vec<u32> {
        let first = self.msrs.first();
        first
            .map(|msrs| msrs.indices().collect())
            .unwrap_or_default()
    }

    /// Keeps the state of a machine that is fresh from KVM, for [`reset`](Self::reset).
    pub(crate) fn remember_power_on(&mut self, vm: &VmFd, vcpus: &Vcpus) -> Result<(), SaveError> {
        let mut state = Vec::new();
        self.save(vm, vcpus, &mut state)?;
        let damaged = |error: StateError| SaveError::Vm {
            call: "read back the power-on state",
            source: io::Error::other(error),
        };
        let checked = self.check(&state).map_err(damaged)?;
        self.power_on = Some(PowerOn {
            vcpus: checked.vcpus,
            pit: checked.pit,
            irqchips: checked.irqchips,
        });
        Ok(())
    }

    /// Makes a stopped, quiet machine what it was at power-on. The TSC begins at 0 again, kvmclock goes on: it is
    /// the host's, and a guest sets it up anew.
    pub(crate) fn reset(&mut self, vm: &VmFd, vcpus: &Vcpus) -> Result<(), SaveError> {
        let Some(state) = &self.power_on else {
            return Ok(());
        };
        self.frozen = None;
        let tsc = vec![0; state.vcpus.len()];
        apply_machine(vm, vcpus, &state.vcpus, &tsc, &state.irqchips, &state.pit)?;
        for attached in &self.devices {
            let power_on = attached.power_on.as_deref().unwrap_or_default();
            lock(&attached.device).reset(power_on);
        }
        Ok(())
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
        self.devices.push(Attached {
            name,
            device,
            power_on: None,
        });
        Ok(())
    }

    pub(crate) fn quiesce(&self) {
        for attached in &self.devices {
            lock(&attached.device).quiesce();
        }
    }

    fn remember_devices(&mut self) {
        for attached in &mut self.devices {
            let device = &attached.device;
            attached.power_on.get_or_insert_with(|| {
                let mut section = Vec::new();
                lock(device).save(&mut section);
                section
            });
        }
    }

    pub(crate) fn resume(&mut self) {
        self.remember_devices();
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
        writer.section(TIME, TIME_VERSION, |out| save_time(vm, vcpus, out))?;
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

        let mut pieces = Pieces::new(TIME, find_ours(TIME, TIME_VERSION)?);
        let clock = pieces.take("clock")?;
        let realtime = match find(TIME)?.version {
            1 => 0,
            _ => pieces.take("wall clock")?,
        };
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
            realtime,
            tsc,
            pit,
            irqchips,
            vcpus,
            devices,
        })
    }

    /// Makes a stopped, quiet machine what a checked state says.
    pub(crate) fn apply(
        &mut self,
        vm: &VmFd,
        vcpus: &Vcpus,
        state: Checked<'_>,
    ) -> Result<(), ApplyError> {
        let Checked {
            clock,
            realtime,
            mut tsc,
            pit,
            irqchips,
            vcpus: decoded,
            devices,
        } = state;
        // KVM's clocks run from here on, whether the guest does or not.
        let away = match self.clock {
            ClockPolicy::Step => away(realtime, sys::realtime()),
            ClockPolicy::GoOn => 0,
        };
        let ticks = u128::from(away) * u128::from(self.shape.tsc_khz) / 1_000_000;
        for tsc in &mut tsc {
            *tsc = tsc.wrapping_add(u64::try_from(ticks).unwrap_or(0));
        }
        self.remember_devices();
        apply_machine(vm, vcpus, &decoded, &tsc, &irqchips, &pit)?;
        set_clock(vm, clock.saturating_add(away))?;
        self.frozen = (self.clock == ClockPolicy::GoOn).then_some(Frozen {
            clock,
            tsc,
            vcpus: decoded,
        });
        for (attached, section) in self.devices.iter().zip(&devices) {
            lock(&attached.device).load(section.version, section.bytes)?;
        }
        Ok(())
    }

    /// Before vCPUs run: lets clocks that were to stand still since the load go on from what they showed.
    pub(crate) fn thaw(&mut self, vm: &VmFd, vcpus: &Vcpus) -> Result<(), SaveError> {
        let Some(frozen) = self.frozen.take() else {
            return Ok(());
        };
        let host_tsc = sys::host_tsc();
        for (id, (decoded, tsc)) in frozen.vcpus.iter().zip(&frozen.tsc).enumerate() {
            if let Some(fd) = vcpus.fd(id) {
                vcpu_state::set_time(id, &fd, decoded, *tsc, host_tsc)?;
            }
        }
        set_clock(vm, frozen.clock)
    }
}

/// How long a state was on its way, in ns, by the wall clocks of both hosts.
fn away(then: u64, now: u64) -> u64 {
    match now.checked_sub(then) {
        Some(away) if then != 0 && away <= FARTHEST => away,
        // A snapshot, or hosts whose clocks disagree.
        _ => 0,
    }
}

fn set_clock(vm: &VmFd, clock: u64) -> Result<(), SaveError> {
    let clock = kvm_clock_data {
        clock,
        ..Default::default()
    };
    vm.set_clock(&clock).map_err(vm_call("KVM_SET_CLOCK"))
}

fn apply_machine(
    vm: &VmFd,
    vcpus: &Vcpus,
    decoded: &[Decoded],
    tsc: &[u64],
    irqchips: &[kvm_irqchip; 3],
    pit: &kvm_pit_state2,
) -> Result<(), SaveError> {
    // One reading for all vCPUs: their TSCs keep their distance.
    let host_tsc = sys::host_tsc();
    for (id, (decoded, tsc)) in decoded.iter().zip(tsc).enumerate() {
        if let Some(fd) = vcpus.fd(id) {
            vcpu_state::load(id, &fd, decoded, *tsc, host_tsc)?;
        }
    }
    for chip in irqchips {
        vm.set_irqchip(chip).map_err(vm_call("KVM_SET_IRQCHIP"))?;
    }
    vm.set_pit2(pit).map_err(vm_call("KVM_SET_PIT2"))
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
    // KVM tells both clocks at one moment from Linux 5.16 on.
    let realtime = if clock.flags & KVM_CLOCK_REALTIME == 0 {
        sys::realtime()
    } else {
        clock.realtime
    };
    out.extend_from_slice(&realtime.to_le_bytes());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_that_no_checkpoint_takes_is_a_difference_between_clocks() {
        assert_eq!(away(1_000, 22_000_000), 21_999_000);
        assert_eq!(
            away(22_000_000, 1_000),
            0,
            "the other host's clock is ahead"
        );
        assert_eq!(
            away(1_000, 3_600_000_000_000),
            0,
            "a snapshot of an hour ago"
        );
        assert_eq!(away(0, 1_000), 0, "a state without it");
    }
}
