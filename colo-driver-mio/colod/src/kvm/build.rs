//! From a configuration to a machine with its devices. Both hosts build the same.

use std::{
    fs,
    os::fd::{AsRawFd as _, RawFd},
    path::Path,
    sync::{Arc, Mutex},
};

use crate::config::{self, Backend, ClockName, Config, Console, CpuName, Size, Then};
use colo_driver_kvm::{
    boot::{self, Boot},
    caps::Host,
    cpuid::{Cpu, CpuModel},
    device::{
        I8042, Irq, PowerLine, ResetLine, Serial, Sink,
        virtio::{Block, Disk, Net, NetConfig, Rng, Virtio},
    },
    state::ClockPolicy,
    vm::{Vm, VmConfig},
};
use colo_proto::id::Slot;

use super::worker::lock;
use crate::cli::Failure;

/// COM1 of a PC.
const COM1: (u16, u32) = (0x3f8, 4);

/// Where the disk's pages are in a checkpoint, beside those of RAM.
pub(super) const DISK: Slot = Slot(16);

/// The network card, shared between vCPU threads, the worker and the loop.
pub(super) type Card = Arc<Mutex<Virtio<Net>>>;

/// The devices that serve where the notification arrives. What they leave for later is the worker's.
#[derive(Clone, Debug)]
pub(super) struct Served {
    pub(super) disk: Option<Arc<Mutex<Virtio<Block>>>>,
    pub(super) entropy: Arc<Mutex<Virtio<Rng>>>,
}

impl Served {
    /// Readable when [`serve`](Self::serve) has something to do.
    pub(super) fn fds(&self) -> impl Iterator<Item = RawFd> {
        let disk = self.disk.as_ref();
        let disk = disk.map(|disk| lock(disk).wake_fd().as_raw_fd());
        disk.into_iter()
            .chain([lock(&self.entropy).wake_fd().as_raw_fd()])
    }

    /// The image of the disk, to be used without the device.
    pub(super) fn image(&self) -> Option<Arc<Disk>> {
        let disk = self.disk.as_ref()?;
        Some(Arc::clone(lock(disk).device().disk()))
    }

    pub(super) fn serve(&self) {
        if let Some(disk) = &self.disk {
            lock(disk).serve();
        }
        lock(&self.entropy).serve();
    }
}

/// A machine that has not run.
#[derive(Debug)]
pub(crate) struct Built {
    pub(crate) vm: Vm,
    pub(super) card: Option<Card>,
    pub(super) served: Served,
    /// Mute while this host does not own the VM.
    pub(crate) console: Sink,
    pub(super) reset: ResetLine,
    pub(super) power: PowerLine,
    pub(super) on_reboot: Then,
    pub(super) on_crash: Then,
    pub(super) image: Image,
    /// Memory holds nothing that could run: the image must be booted first.
    pub(super) fresh: bool,
}

/// What the guest boots from, if it has to be booted here.
#[derive(Debug)]
pub(super) struct Image {
    kernel: Vec<u8>,
    initrd: Option<Vec<u8>>,
    cmdline: String,
}

impl Image {
    fn read(config: &Config) -> Result<Self, Failure> {
        let read =
            |path: &Path| fs::read(path).map_err(|error| format!("{}: {error}", path.display()));
        let kernel = match config.vm.kernel.to_str() {
            Some("builtin:server") => colo_guests::SERVER.to_vec(),
            _ => read(&config.vm.kernel)?,
        };
        boot::identify(&kernel)
            .map_err(|error| format!("vm.kernel {}: {error}", config.vm.kernel.display()))?;
        Ok(Self {
            kernel,
            initrd: config.vm.initrd.as_deref().map(read).transpose()?,
            cmdline: config.vm.cmdline.clone(),
        })
    }

    /// Puts the kernel into the machine's memory.
    pub(super) fn boot(&self, vm: &mut Vm) -> Result<(), Failure> {
        let booted = vm.boot(&Boot {
            kernel: &self.kernel,
            initrd: self.initrd.as_deref(),
            cmdline: &self.cmdline,
        });
        booted.map_err(|error| format!("the kernel cannot be booted: {error}"))?;
        Ok(())
    }
}

impl Built {
    /// Puts the kernel where a start as primary would. The machine is of no use afterwards.
    pub(crate) fn rehearse_boot(&mut self) -> Result<(), Failure> {
        self.image.boot(&mut self.vm)
    }

    /// Makes the machine what `colod save` wrote, instead of booting it.
    pub(crate) fn restore(&mut self, state: &Path) -> Result<(), Failure> {
        self.vm.restore(state)?;
        self.fresh = false;
        Ok(())
    }
}

/// Builds the machine.
pub(crate) fn build(config: &Config) -> Result<Built, Failure> {
    let host = Host::open()?;
    let image = Image::read(config)?;
    enough_memory(config.vm.memory, host_memory())?;
    let cpu = match config.vm.cpu {
        Some(CpuName::V1) => CpuModel::V1,
        Some(CpuName::V2) => CpuModel::V2,
        Some(CpuName::V3) => CpuModel::V3,
        Some(CpuName::Host) => CpuModel::Host,
        None => Cpu::best(host.kvm())?,
    };
    let mut vm = Vm::new(
        &host,
        &VmConfig {
            memory: config.vm.memory.0,
            vcpus: config.vm.vcpus.into(),
            cpu,
            clock: match config.vm.clock {
                ClockName::Step => ClockPolicy::Step,
                ClockName::GoOn => ClockPolicy::GoOn,
            },
            ..VmConfig::default()
        },
    )?;
    let console = console(config)?;
    let line = Irq::new()?;
    let serial = Arc::new(Mutex::new(Serial::new(
        "serial0",
        line.clone(),
        console.clone(),
    )));
    vm.attach(Arc::clone(&serial))?;
    vm.map_ports(COM1.0, Serial::LEN as u16, serial)?;
    vm.route_irq(&line, COM1.1)?;
    let i8042 = I8042::new("i8042", vm.event_fd().try_clone()?);
    let reset = i8042.reset_line().clone();
    let i8042 = Arc::new(Mutex::new(i8042));
    vm.attach(Arc::clone(&i8042))?;
    vm.map_ports(I8042::BASE as u16, I8042::LEN as u16, i8042)?;
    let card = (config.net.backend != Backend::None)
        .then(|| card(&mut vm, config))
        .transpose()?;
    let paired = config.pair.is_some();
    let disk = config.disk.as_ref();
    let disk = disk
        .map(|disk| attach_disk(&mut vm, disk, paired))
        .transpose()?;
    let line = Irq::new()?;
    let ram = vm.memory().ram().clone();
    let entropy = Virtio::new("virtio-rng0", Rng::new(), ram, line.clone())?;
    let entropy = Arc::new(Mutex::new(entropy));
    vm.attach_mmio(Arc::clone(&entropy), &line)?;
    let power = lock(vm.power()).line().clone();
    Ok(Built {
        vm,
        card,
        served: Served { disk, entropy },
        console,
        reset,
        power,
        on_reboot: config.vm.on_reboot,
        on_crash: config.vm.on_crash,
        image,
        fresh: true,
    })
}

/// Guest memory that the host has not got would be found missing by the kernel's choice of a process
/// to kill.
fn enough_memory(guest: Size, host: Option<Size>) -> Result<(), Failure> {
    match host {
        Some(host) if guest > host => {
            Err(format!("vm.memory is {guest}, but this host has {host} in all").into())
        }
        _ => Ok(()),
    }
}

/// All memory of this host, if it says so.
fn host_memory() -> Option<Size> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    // In whole mebibytes, as people write sizes.
    Some(Size(kib >> 10 << 20))
}

fn attach_disk(
    vm: &mut Vm,
    disk: &config::Disk,
    paired: bool,
) -> Result<Arc<Mutex<Virtio<Block>>>, Failure> {
    let image = Arc::new(Disk::open(&disk.path, disk.readonly)?);
    if paired && !disk.readonly && image.map().is_none() {
        let (path, len) = (disk.path.display(), image.len());
        return Err(format!(
            "disk.path {path} has {len} bytes, expected a multiple of 4096 in a pair, on a file system or device that can be mapped"
        )
        .into());
    }
    let line = Irq::new()?;
    let ram = vm.memory().ram().clone();
    let block = Block::new(Arc::clone(&image), "disk0");
    let device = Virtio::new("virtio-blk0", block, ram, line.clone())?;
    let device = Arc::new(Mutex::new(device));
    vm.attach_mmio(Arc::clone(&device), &line)?;
    // What nobody writes needs no copying: it is the same on both hosts, or should be.
    if !disk.readonly {
        vm.attach_store(DISK, image)?;
    }
    Ok(device)
}

fn card(vm: &mut Vm, config: &Config) -> Result<Card, Failure> {
    let line = Irq::new()?;
    let net = Net::new(NetConfig {
        mac: config.net.mac.0,
        offloads: super::backend::offloads(&config.net),
    });
    let ram = vm.memory().ram().clone();
    let card = Arc::new(Mutex::new(Virtio::new(
        "virtio-net0",
        net,
        ram,
        line.clone(),
    )?));
    let window = vm.attach_mmio(Arc::clone(&card), &line)?;
    let locked = card.lock().map_err(|_| "the card's lock is poisoned")?;
    vm.route_notify(locked.wake_fd(), window.base + Virtio::<Net>::MMIO_NOTIFY)?;
    drop(locked);
    Ok(card)
}

fn console(config: &Config) -> Result<Sink, Failure> {
    match (config.serial.console, &config.serial.path) {
        (Console::Stdio, _) => Ok(Sink::stdout()?),
        (Console::File, Some(path)) => Sink::file(path)
            .map_err(|error| format!("serial.path {}: {error}", path.display()).into()),
        _ => Ok(Sink::null()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_the_host_has_not_got_is_refused_with_both_sizes() {
        let (host, guest) = (Size(23 << 30), Size(63 << 30));
        let error = enough_memory(guest, Some(host)).unwrap_err().to_string();
        assert_eq!(error, "vm.memory is 63G, but this host has 23G in all");
        enough_memory(host, Some(host)).unwrap();
        enough_memory(guest, None).unwrap();
        assert!(host_memory().unwrap() > Size(16 << 20));
    }
}
