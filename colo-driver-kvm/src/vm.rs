//! The virtual machine: made in the order KVM wants, then paused and resumed as a whole.
//!
//! Order of creation: VM, dirty-log capability (before memory and vCPUs), TSS address, interrupt
//! controllers and PIT (before vCPUs, so that they get LAPICs), memory, vCPUs with their CPUID,
//! devices, guest, threads.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use colo_proto::id::Slot;
use colo_proto::ram::PageSet;
use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::acpi::Platform;
use crate::caps::{self, Host, HostError};
use crate::cpuid::{self, Cpu, CpuError, CpuModel};
use crate::device::pci::HOST_BRIDGE;
use crate::device::{Bus, BusDevice, BusError, Device, Irq, Power, PowerLine, Rtc};
use crate::dirty::{Dirty, DirtyMode};
use crate::memory::layout::{self, Layout, LayoutError};
use crate::memory::{Backing, Memory, MemoryError, PageStore};
use crate::state::StateError;
use crate::state::registry::{ApplyError, ClockPolicy, Registry, SaveError, Shape};
use crate::vcpu::state::MsrBuffer;
use crate::vcpu::{VcpuEvent, Vcpus};

mod attach;
mod routes;

use attach::Pci;
pub use attach::Transport;

/// Most vCPUs of a guest.
pub const MOST_VCPUS: usize = 8;

/// The guest's watchdogs do not notice a pause as short as that, and need no excuse: one in every checkpoint would
/// take them off duty.
const UNNOTICED: Duration = Duration::from_secs(1);

/// What a VM is made of.
#[derive(Debug, Clone)]
pub struct VmConfig {
    /// Guest RAM in bytes: a multiple of 4096, at least 2 MiB.
    pub memory: u64,
    /// 1 to 8.
    pub vcpus: usize,
    /// What processor they show.
    pub cpu: CpuModel,
    /// How writes are logged.
    pub dirty: DirtyMode,
    /// What the guest's clocks do between a checkpoint and the moment in which it goes on from there.
    pub clock: ClockPolicy,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            memory: 128 << 20,
            vcpus: 1,
            cpu: CpuModel::default(),
            dirty: DirtyMode::default(),
            clock: ClockPolicy::default(),
        }
    }
}

/// Why a VM could not be made or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmError {
    /// The host.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The processor model.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// The memory map.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// An address range.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// How many vCPUs.
    #[error("{asked} vCPUs: choose 1 to {most}")]
    Vcpus {
        /// How many were asked for.
        asked: usize,
        /// How many can be had here.
        most: usize,
    },
    /// A device's section name is empty, too long or taken.
    #[error("section name {name:?} is taken, empty or longer than 64 bytes: name each device once")]
    SectionName {
        /// The name.
        name: String,
    },
    /// Too late.
    #[error("the guest has run already: attach devices and disks before the first resume")]
    HasRun,
    /// Too many devices.
    #[error(
        "no window is left for another virtio-mmio device: {} are the most",
        layout::MOST_MMIO
    )]
    NoWindow,
    /// Too many devices.
    #[error(
        "no place is left for another PCI device: {} are the most",
        crate::device::pci::MOST_FUNCTIONS
    )]
    NoFunction,
    /// A state call.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// The system refused.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Why a state was not loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadStateError {
    /// Refused before anything was touched.
    #[error(transparent)]
    Refused(#[from] StateError),
    /// Refused by the kernel in the middle.
    #[error(transparent)]
    Failed(#[from] ApplyError),
}

/// Where a virtio-mmio device answers and interrupts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioWindow {
    /// First address.
    pub base: u64,
    /// Bytes.
    pub len: u64,
    /// Interrupt line.
    pub gsi: u32,
}

/// A KVM virtual machine.
///
/// One thread owns it at a time; it may be sent to another. It begins paused.
#[derive(Debug)]
pub struct Vm {
    // Fields drop in this order: the threads end before the descriptors they use.
    pub(crate) vcpus: Vcpus,
    pub(crate) registry: Registry,
    pub(crate) dirty: Dirty,
    pub(crate) memory: Memory,
    vm: Arc<VmFd>,
    ports: Arc<Bus>,
    mmio: Arc<Bus>,
    layout: Layout,
    cpu: Cpu,
    windows: Vec<MmioWindow>,
    pci: Option<Pci>,
    power: Arc<Mutex<Power>>,
    power_line: PowerLine,
    /// When it was paused.
    stopped: Option<Instant>,
    rtc: Arc<Mutex<Rtc>>,
    /// The devices are quiesced.
    quiet: bool,
}

fn kvm_call(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> HostError {
    move |e| HostError::Kvm {
        what,
        source: e.into(),
    }
}

fn system(what: &'static str) -> impl Fn(io::Error) -> VmError {
    move |source| VmError::System { what, source }
}

impl Vm {
    /// A paused VM with memory and vCPUs, and nothing in it.
    ///
    /// # Errors
    ///
    /// [`VmError`] naming what the host lacks or the configuration has wrong.
    pub fn new(host: &Host, config: &VmConfig) -> Result<Self, VmError> {
        let kvm = host.kvm();
        let most = MOST_VCPUS.min(host.max_vcpus());
        if config.vcpus == 0 || config.vcpus > most {
            return Err(VmError::Vcpus {
                asked: config.vcpus,
                most,
            });
        }
        let layout = Layout::new(config.memory, cpuid::physical_bits(kvm)?)?;
        let cpu = Cpu::new(kvm, config.cpu)?;

        let vm = kvm.create_vm().map_err(kvm_call("KVM_CREATE_VM"))?;
        match config.dirty {
            DirtyMode::Bitmap => caps::enable_manual_protect(&vm)?,
            DirtyMode::Ring(entries) => caps::enable_rings(&vm, host, entries)?,
        }
        let tss = usize::try_from(layout::TSS_BASE).unwrap_or(usize::MAX);
        vm.set_tss_address(tss)
            .map_err(kvm_call("KVM_SET_TSS_ADDR"))?;
        vm.create_irq_chip()
            .map_err(kvm_call("KVM_CREATE_IRQCHIP"))?;
        vm.create_pit2(kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        })
        .map_err(kvm_call("KVM_CREATE_PIT2"))?;

        let memory = Memory::new(&layout)?;
        set_slots(&vm, &memory, false)?;

        let count = u8::try_from(config.vcpus).unwrap_or(u8::MAX);
        let mut fds: Vec<VcpuFd> = Vec::new();
        let mut msrs = Vec::new();
        let listed = kvm
            .get_msr_index_list()
            .map_err(kvm_call("KVM_GET_MSR_INDEX_LIST"))?;
        let mut tsc_khz = 0;
        for id in 0..count {
            let fd = vm
                .create_vcpu(id.into())
                .map_err(kvm_call("KVM_CREATE_VCPU"))?;
            caps::need_tsc_offset(&fd)?;
            if id == 0 {
                tsc_khz = fd.get_tsc_khz().unwrap_or(0);
            }
            fd.set_cpuid2(&cpu.for_vcpu(id, count, tsc_khz)?)
                .map_err(kvm_call("KVM_SET_CPUID2"))?;
            crate::sys::one_machine_check_bank(&fd).map_err(system("KVM_X86_SETUP_MCE"))?;
            let kept = MsrBuffer::new(listed.as_slice(), &fd);
            msrs.push(kept.map_err(system("list MSRs"))?);
            fds.push(fd);
        }
        let dirty =
            Dirty::new(config.dirty, &vm, &memory, fds.iter()).map_err(system("dirty log"))?;
        let vcpus = Vcpus::new(fds, vm.run_size(), dirty.rings()).map_err(system("vCPU set-up"))?;
        let shape = Shape {
            vcpus: config.vcpus,
            cpu: cpu.hash(),
            tsc_khz,
            slots: memory.shape(),
        };
        let mut registry = Registry::new(shape, msrs, config.clock);
        registry.remember_power_on(&vm, &vcpus)?;
        let owner = vcpus.event_fd().try_clone();
        let line = Irq::new().map_err(system("interrupt line"))?;
        let power = Power::new(line.clone(), owner.map_err(system("eventfd"))?);
        let power_line = power.line().clone();
        let mut machine = Self {
            registry,
            vcpus,
            dirty,
            memory,
            vm: Arc::new(vm),
            pci: None,
            ports: Arc::default(),
            mmio: Arc::default(),
            layout,
            cpu,
            windows: Vec::new(),
            power: Arc::new(Mutex::new(power)),
            power_line,
            stopped: None,
            rtc: Arc::new(Mutex::new(Rtc::new())),
            quiet: true,
        };
        machine.on_board(&line)?;
        Ok(machine)
    }

    /// What every machine has, and its tables speak of: the power block and the clock.
    fn on_board(&mut self, line: &Irq) -> Result<(), VmError> {
        let power = Arc::clone(&self.power);
        self.attach(Arc::clone(&power))?;
        self.map_ports(Power::BASE, Power::LEN, power)?;
        self.route_irq(line, Power::LINE)?;
        let rtc = Arc::clone(&self.rtc);
        self.attach(Arc::clone(&rtc))?;
        self.map_ports(Rtc::BASE, Rtc::LEN, rtc)
    }

    /// The power block: its button, and what the guest asks of its switch.
    #[must_use]
    pub fn power(&self) -> &Arc<Mutex<Power>> {
        &self.power
    }

    /// The clock with its battery-backed memory.
    #[must_use]
    pub fn rtc(&self) -> &Arc<Mutex<Rtc>> {
        &self.rtc
    }

    /// What the guest's tables speak of.
    pub(crate) fn platform(&self) -> Platform<'_> {
        Platform {
            vcpus: self.shape().vcpus,
            windows: &self.windows,
            bridge: self.has_pci().then_some(&HOST_BRIDGE),
        }
    }

    /// Guest memory: share it with devices, and with whoever sends and receives pages.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Where RAM lies.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// What the vCPUs show: its hash is for the hello, its leaves for the refusal.
    #[must_use]
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// Numbers of the MSRs that are part of a checkpoint: a peer must keep the same ones.
    #[must_use]
    pub fn msrs(&self) -> Vec<u32> {
        self.registry.msrs()
    }

    /// What a peer must have in common with this machine.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        self.registry.shape()
    }

    // --- Before the first resume -----------------------------------------------------------------

    /// Makes a device part of every checkpoint; it is quiesced until the first resume. Put it on a bus too.
    ///
    /// # Errors
    ///
    /// Its section name is taken, or the guest has run.
    pub fn attach<D: Device + 'static>(&mut self, device: Arc<Mutex<D>>) -> Result<(), VmError> {
        self.before_first_run()?;
        self.registry
            .attach(device)
            .map_err(|name| VmError::SectionName { name })
    }

    /// Lets a device answer `len` I/O ports from `base` on.
    ///
    /// # Errors
    ///
    /// The range is taken, or the guest has run.
    pub fn map_ports<D: BusDevice + 'static>(
        &mut self,
        base: u16,
        len: u16,
        device: Arc<Mutex<D>>,
    ) -> Result<(), VmError> {
        self.before_first_run()?;
        Ok(self.ports.insert(base.into(), len.into(), device)?)
    }

    /// Lets a device answer `len` guest-physical addresses from `base` on.
    ///
    /// # Errors
    ///
    /// The range is taken, or the guest has run.
    pub fn map_mmio<D: BusDevice + 'static>(
        &mut self,
        base: u64,
        len: u64,
        device: Arc<Mutex<D>>,
    ) -> Result<(), VmError> {
        self.before_first_run()?;
        Ok(self.mmio.insert(base, len, device)?)
    }

    /// Attaches a virtio-mmio device in the next free window: bus, interrupt line, section, and a
    /// word on the guest's command line.
    ///
    /// # Errors
    ///
    /// No window is left, the section name is taken, or the guest has run.
    pub fn attach_mmio<D: Device + 'static>(
        &mut self,
        device: Arc<Mutex<D>>,
        irq: &Irq,
    ) -> Result<MmioWindow, VmError> {
        let (base, gsi) = layout::mmio_window(self.windows.len()).ok_or(VmError::NoWindow)?;
        let window = MmioWindow {
            base,
            len: layout::MMIO_STRIDE,
            gsi,
        };
        self.map_mmio(base, window.len, device.clone())?;
        self.attach(device)?;
        self.route_irq(irq, gsi)?;
        self.windows.push(window);
        Ok(window)
    }

    /// The virtio-mmio devices in the order they were attached.
    #[must_use]
    pub fn windows(&self) -> &[MmioWindow] {
        &self.windows
    }

    /// Puts a disk's pages under checkpoints, as slot `slot` (16 or higher).
    ///
    /// # Errors
    ///
    /// The slot is taken, or the guest has run.
    pub fn attach_store(&mut self, slot: Slot, store: Arc<dyn PageStore>) -> Result<(), VmError> {
        self.before_first_run()?;
        let pages = store.pages();
        self.memory = self.memory.with_store(slot, store)?;
        self.registry.add_slot(slot, pages);
        self.dirty.reshape(&self.memory);
        if self.dirty.tracking() {
            self.dirty.set_tracking(true);
        }
        Ok(())
    }

    /// Connects an interrupt line to a pin of the I/O APIC (and the PIC, below 16).
    ///
    /// # Errors
    ///
    /// KVM refused.
    pub fn route_irq(&self, irq: &Irq, gsi: u32) -> Result<(), VmError> {
        Ok(self
            .vm
            .register_irqfd(irq.fd(), gsi)
            .map_err(kvm_call("KVM_IRQFD"))?)
    }

    /// Signals `fd` when the guest writes anything to `addr`, without an exit.
    ///
    /// # Errors
    ///
    /// KVM refused.
    pub fn route_notify(&self, fd: &EventFd, addr: u64) -> Result<(), VmError> {
        Ok(self
            .vm
            .register_ioevent(fd, &IoEventAddress::Mmio(addr), NoDatamatch)
            .map_err(kvm_call("KVM_IOEVENTFD"))?)
    }

    fn before_first_run(&self) -> Result<(), VmError> {
        if self.vcpus.spawned() {
            return Err(VmError::HasRun);
        }
        Ok(())
    }

    // --- Running ---------------------------------------------------------------------------------

    /// Whether the guest runs.
    #[must_use]
    pub fn running(&self) -> bool {
        self.vcpus.running()
    }

    /// Stops the vCPUs, then the devices. When it returns nothing touches guest memory.
    pub fn pause(&mut self) {
        if self.vcpus.running() {
            self.stopped = Some(Instant::now());
        }
        self.vcpus.pause();
        self.quiesce();
    }

    /// Lets the devices, then the vCPUs run.
    ///
    /// # Errors
    ///
    /// Threads could not be started, the first time.
    pub fn resume(&mut self) -> Result<(), VmError> {
        if !self.vcpus.spawned() {
            self.vcpus
                .spawn(&self.ports, &self.mmio, &self.power_line)
                .map_err(system("start vCPU threads"))?;
        }
        self.registry.thaw(&self.vm, &self.vcpus)?;
        if std::mem::take(&mut self.quiet) {
            self.registry.resume();
        }
        if self
            .stopped
            .take()
            .is_some_and(|at| at.elapsed() > UNNOTICED)
        {
            self.vcpus.excuse();
        }
        self.vcpus.resume();
        Ok(())
    }

    /// As after power-on: vCPUs, interrupt controllers and devices, with the machine paused and its disks and memory
    /// as they are. The real-time clock and the network go on. [Boot](Self::boot) a guest before the next resume.
    ///
    /// # Errors
    ///
    /// The kernel refused: the machine must not run.
    pub fn reset(&mut self) -> Result<(), ApplyError> {
        self.pause();
        self.registry.reset(&self.vm, &self.vcpus)?;
        // They were about the guest that was here before.
        drop(self.vcpus.take_events());
        Ok(())
    }

    pub(crate) fn quiesce(&mut self) {
        if !self.quiet {
            self.registry.quiesce();
            self.quiet = true;
        }
    }

    /// Becomes readable when a vCPU has something to say: see [`take_events`](Self::take_events). Devices whose
    /// owner is the VM's may write it too.
    #[must_use]
    pub fn event_fd(&self) -> &EventFd {
        self.vcpus.event_fd()
    }

    /// What the vCPUs said: a shutdown, or why one cannot go on. A vCPU that ended stays where it
    /// is until a state is loaded, which takes back what was said before.
    #[must_use]
    pub fn take_events(&self) -> Vec<VcpuEvent> {
        self.vcpus.take_events()
    }

    // --- Dirty tracking --------------------------------------------------------------------------

    /// Begins to log writes. Every page counts as dirty once.
    ///
    /// # Errors
    ///
    /// KVM refused.
    pub fn start_tracking(&mut self) -> Result<(), VmError> {
        if self.dirty.tracking() {
            return Ok(());
        }
        self.switch_tracking(true)
    }

    /// Ends the log, and its cost for the guest.
    ///
    /// # Errors
    ///
    /// KVM refused.
    pub fn stop_tracking(&mut self) -> Result<(), VmError> {
        if !self.dirty.tracking() {
            return Ok(());
        }
        self.switch_tracking(false)
    }

    fn switch_tracking(&mut self, on: bool) -> Result<(), VmError> {
        set_slots(&self.vm, &self.memory, on)?;
        self.dirty.set_tracking(on);
        Ok(())
    }

    /// Joins the pages dirtied since the last call into `into`, while the guest runs: the rounds of
    /// the first synchronisation, and the secondary's own pages.
    ///
    /// Read the pages after this call.
    ///
    /// # Errors
    ///
    /// KVM refused.
    pub fn harvest(&mut self, into: &mut PageSet) -> Result<(), VmError> {
        self.dirty
            .collect(&self.memory, into)
            .map_err(system("collect dirty pages"))
    }

    /// Gives harvested pages back, to be part of the next harvest or capture: they were not
    /// delivered after all.
    pub fn give_back(&mut self, pages: &PageSet) {
        self.dirty.owe(pages);
    }

    // --- State -----------------------------------------------------------------------------------

    /// Writes the state of the paused machine, without memory, into `out` (emptied first).
    ///
    /// # Errors
    ///
    /// KVM refused.
    pub fn save_state(&mut self, out: &mut Vec<u8>) -> Result<(), VmError> {
        self.pause();
        Ok(self.registry.save(&self.vm, &self.vcpus, out)?)
    }

    /// Whether [`load_state`](Self::load_state) would take this state. Changes nothing.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn check_state(&self, state: &[u8]) -> Result<(), StateError> {
        self.registry.check(state).map(drop)
    }

    /// Makes the machine what `state` says. Pauses it; memory must be in place already. Every
    /// section is checked before the first is applied.
    ///
    /// # Errors
    ///
    /// [`LoadStateError::Refused`]: nothing was changed (but the pause).
    /// [`LoadStateError::Failed`]: the kernel refused what the checks let pass; do not resume.
    pub fn load_state(&mut self, state: &[u8]) -> Result<(), LoadStateError> {
        self.pause();
        let checked = self.registry.check(state)?;
        self.registry.apply(&self.vm, &self.vcpus, checked)?;
        // They were about the guest that was here before.
        drop(self.vcpus.take_events());
        Ok(())
    }
}

/// Tells KVM about every RAM slot, with or without a dirty log.
fn set_slots(vm: &VmFd, memory: &Memory, log: bool) -> Result<(), HostError> {
    for entry in memory.slots() {
        let Backing::Ram { map, base } = &entry.backing else {
            continue;
        };
        let region = kvm_userspace_memory_region {
            slot: entry.slot.0.into(),
            flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: *base,
            memory_size: map.size() as u64,
            userspace_addr: map.as_ptr().expose_provenance() as u64,
        };
        // SAFETY: the mapping is this long and lives as long as `Memory`, of which the VM keeps a
        // clone that drops after the vCPUs' threads have ended; slots do not overlap.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(kvm_call("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

const _: () = {
    const fn send<T: Send>() {}
    send::<Vm>();
};

impl AsRawFd for Vm {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.vm.as_raw_fd()
    }
}
