//! Virtio devices into the machine, on either transport.

use std::sync::{Arc, Mutex, PoisonError};

use super::routes::{FIRST_MESSAGE, Rings, Routes};
use super::{Vm, VmError, kvm_call, system};
use crate::device::pci::{
    ConfigPorts, Doorbell, Ecam, HOST_BRIDGE, MOST_FUNCTIONS, MessageLine, Msix, PciRoot,
};
use crate::device::virtio::{Backend, Virtio, VirtioPci};
use crate::device::{Device, Irq};

/// How the guest finds a virtio device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Transport {
    /// In a window of its own, with an interrupt line.
    #[default]
    Mmio,
    /// Behind the PCI host bridge, with messages.
    Pci,
}

/// The PCI side of the machine; there from the first PCI device on.
#[derive(Debug)]
pub(super) struct Pci {
    root: Arc<Mutex<PciRoot>>,
    routes: Arc<Routes>,
    devices: usize,
    next_line: u32,
}

impl Vm {
    /// Attaches a virtio device: bus, interrupts, section `section`.
    ///
    /// # Errors
    ///
    /// No place is left, the section name is taken, the guest has run, or KVM refused.
    pub fn attach_virtio<D>(
        &mut self,
        transport: Transport,
        section: &str,
        device: D,
    ) -> Result<Arc<Mutex<Virtio<D>>>, VmError>
    where
        D: Backend + 'static,
        Virtio<D>: Device,
    {
        match transport {
            Transport::Mmio => self.attach_on_mmio(section, device),
            Transport::Pci => self.attach_on_pci(section, device),
        }
    }

    /// Puts the PCI host bridge in its place, with nothing behind it, if it is not there yet.
    ///
    /// # Errors
    ///
    /// The guest has run, or something else is in its place.
    pub fn attach_pci_root(&mut self) -> Result<(), VmError> {
        self.pci().map(drop)
    }

    /// Whether there is a PCI host bridge: see [`HOST_BRIDGE`].
    #[must_use]
    pub fn has_pci(&self) -> bool {
        self.pci.is_some()
    }

    fn attach_on_mmio<D>(
        &mut self,
        section: &str,
        device: D,
    ) -> Result<Arc<Mutex<Virtio<D>>>, VmError>
    where
        D: Backend + 'static,
        Virtio<D>: Device,
    {
        let line = Irq::new().map_err(system("eventfd"))?;
        let ram = self.memory().ram().clone();
        let device = Virtio::new(section, device, ram, line.clone()).map_err(system("eventfd"))?;
        let device = Arc::new(Mutex::new(device));
        let window = self.attach_mmio(device.clone(), &line)?;
        if D::POLLED {
            let device = device.lock().unwrap_or_else(PoisonError::into_inner);
            self.route_notify(device.wake_fd(), window.base + Virtio::<D>::MMIO_NOTIFY)?;
        }
        Ok(device)
    }

    fn attach_on_pci<D>(
        &mut self,
        section: &str,
        device: D,
    ) -> Result<Arc<Mutex<Virtio<D>>>, VmError>
    where
        D: Backend + 'static,
        Virtio<D>: Device,
    {
        self.before_first_run()?;
        let ram = self.memory().ram().clone();
        let vm = Arc::clone(&self.vm);
        let rings = device.queue_sizes().len();
        let pci = self.pci()?;
        if pci.devices == MOST_FUNCTIONS {
            return Err(VmError::NoFunction);
        }
        let mut lines = Vec::new();
        for _ in 0..=rings {
            let irq = Irq::new().map_err(system("eventfd"))?;
            let gsi = pci.next_line;
            vm.register_irqfd(irq.fd(), gsi)
                .map_err(kvm_call("KVM_IRQFD"))?;
            lines.push(MessageLine { gsi, irq });
            pci.next_line += 1;
        }
        let messages = Msix::new(rings, lines, pci.routes.clone());
        let device = Virtio::new(section, device, ram, messages).map_err(system("eventfd"))?;
        let doorbell = D::POLLED
            .then(|| {
                let fd = device.wake_fd().try_clone().map_err(system("eventfd"))?;
                let offset = VirtioPci::<D>::NOTIFY;
                Ok::<_, VmError>(Doorbell { offset, fd })
            })
            .transpose()?;
        let device = Arc::new(Mutex::new(device));
        pci.devices += 1;
        let name = format!("pci{}", pci.devices);
        let root = pci.root.clone();
        // Made with messages just now.
        let function = VirtioPci::new(&name, device.clone()).ok_or(VmError::NoFunction)?;
        let function = Arc::new(Mutex::new(function));
        self.attach(device.clone())?;
        self.attach(function.clone())?;
        root.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(function, doorbell)
            .ok_or(VmError::NoFunction)?;
        Ok(device)
    }

    fn pci(&mut self) -> Result<&mut Pci, VmError> {
        if self.pci.is_none() {
            let rings = Arc::new(Rings(self.vm.clone()));
            let root = Arc::new(Mutex::new(PciRoot::new(self.mmio.clone(), rings)));
            let ecam = Arc::new(Mutex::new(Ecam(root.clone())));
            self.map_mmio(HOST_BRIDGE.ecam, HOST_BRIDGE.ecam_len(), ecam)?;
            let ports = Arc::new(Mutex::new(ConfigPorts(root.clone())));
            self.map_ports(ConfigPorts::BASE, ConfigPorts::LEN, ports)?;
            self.attach(root.clone())?;
            self.pci = Some(Pci {
                root,
                routes: Arc::new(Routes::new(self.vm.clone())),
                devices: 0,
                next_line: FIRST_MESSAGE,
            });
        }
        self.pci.as_mut().ok_or(VmError::NoFunction)
    }
}
