//! What every transport shows: negotiation, rings and reset (virtio 1.2 sections 2.1, 2.2 and 3.1).

use std::io;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::interrupts::Interrupts;
use super::super::mmio::{replace_high, replace_low};
use super::super::ring::{Cursor, Ring};
use super::super::{Backend, Queues};
use crate::memory::GuestRam;

/// What a driver may set; NEEDS_RESET is the device's.
pub(super) const STATUS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_FAILED;

/// A virtio device: everything of `D` that does not depend on where the guest finds it.
///
/// On an MMIO bus it answers [`MMIO_LEN`](Self::MMIO_LEN) addresses itself; on PCI it stands behind a
/// [`VirtioPci`](super::super::VirtioPci). [`wake_fd`](Self::wake_fd) may be registered as an ioeventfd; without it a
/// notification is an ordinary exit.
#[derive(Debug)]
pub struct Virtio<D> {
    pub(super) section: String,
    pub(in super::super) device: D,
    pub(in super::super) queues: Queues,
    pub(super) wake: EventFd,
    pub(super) status: u32,
    pub(in super::super) device_features_sel: u32,
    pub(in super::super) driver_features_sel: u32,
    pub(in super::super) driver_features: u64,
    pub(in super::super) queue_sel: u32,
    /// A state was loaded since the device was quiesced.
    pub(super) loaded: bool,
}

impl<D: Backend> Virtio<D> {
    /// A device after reset. `section` names its state (`"virtio-net0"`); `interrupts` is a line
    /// ([`Irq`](crate::device::Irq)) for MMIO or [`Msix`](crate::device::pci::Msix) for PCI.
    ///
    /// # Errors
    ///
    /// Out of descriptors.
    pub fn new(
        section: &str,
        mut device: D,
        ram: GuestRam,
        interrupts: impl Into<Interrupts>,
    ) -> io::Result<Self> {
        let queues = Queues::new(&device.queue_sizes(), ram, interrupts.into());
        let wake = EventFd::new(EFD_NONBLOCK)?;
        device.connect(wake.try_clone()?);
        Ok(Self {
            section: section.into(),
            device,
            queues,
            wake,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            loaded: false,
        })
    }

    /// The device behind the transport.
    #[must_use]
    pub fn device(&self) -> &D {
        &self.device
    }

    /// Where its interrupts go.
    #[must_use]
    pub fn interrupts(&self) -> &Interrupts {
        &self.queues.interrupts
    }

    /// Whether a driver runs the device.
    #[must_use]
    pub fn has_driver(&self) -> bool {
        self.queues.has_driver()
    }

    /// Requests whose descriptors made no sense, since creation.
    #[must_use]
    pub fn malformed(&self) -> u64 {
        self.queues.malformed
    }

    pub(super) fn offered(&self) -> u64 {
        self.device.features() | 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    /// The half of the features offered that the driver has selected.
    pub(in super::super) fn offered_half(&self) -> u32 {
        half(self.offered(), self.device_features_sel)
    }

    /// The half of the driver's features that it has selected.
    pub(in super::super) fn driver_half(&self) -> u32 {
        half(self.driver_features, self.driver_features_sel)
    }

    pub(in super::super) fn set_driver_features(&mut self, value: u32) {
        if self.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            return;
        }
        match self.driver_features_sel {
            0 => replace_low(&mut self.driver_features, value),
            1 => replace_high(&mut self.driver_features, value),
            // Bits that do not exist: setting one must fail the negotiation, and bit 63 is never offered.
            _ if value != 0 => self.driver_features |= 1 << 63,
            _ => {}
        }
    }

    pub(in super::super) fn status(&self) -> u32 {
        if self.queues.broken {
            self.status | VIRTIO_CONFIG_S_NEEDS_RESET
        } else {
            self.status
        }
    }

    pub(in super::super) fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.power_on();
        }
        if self.status & !value != 0 {
            // A driver never clears a bit except by a reset.
            return;
        }
        let mut fresh = value & STATUS & !self.status;
        if fresh & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !self.features_acceptable() {
            fresh &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if (self.status | fresh) & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            fresh &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        self.status |= fresh;
        if fresh & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            self.queues.features = self.driver_features;
            let event_idx = self.queues.event_idx();
            for ring in &mut self.queues.rings {
                ring.set_event_idx(event_idx);
            }
        }
        if fresh & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.queues.driver_up = true;
            self.kick();
        }
    }

    pub(super) fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered() == 0
            && self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0
    }

    /// The ring that the driver has selected.
    pub(in super::super) fn ring(&self) -> Option<&Ring> {
        self.queues.rings.get(usize::try_from(self.queue_sel).ok()?)
    }

    /// The ring that the driver has selected, while it may be programmed.
    pub(in super::super) fn idle_ring(&mut self) -> Option<&mut Ring> {
        let sel = usize::try_from(self.queue_sel).ok()?;
        let ring = self.queues.rings.get_mut(sel)?;
        (!ring.is_ready()).then_some(ring)
    }

    /// A ring programmed wrongly does not become ready, which the driver reads back.
    pub(in super::super) fn start_ring(&mut self) {
        let event_idx = self.queues.event_idx();
        let ram = self.queues.ram.clone();
        if let Some(ring) = self.idle_ring() {
            let start = Cursor {
                next_available: 0,
                next_used: 0,
            };
            let _started = ring.start(&ram, start, event_idx);
        }
    }

    pub(in super::super) fn stop_ring(&mut self) {
        let sel = usize::try_from(self.queue_sel).unwrap_or(usize::MAX);
        if let Some(ring) = self.queues.rings.get_mut(sel) {
            ring.stop();
        }
    }

    pub(super) fn power_on(&mut self) {
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        self.queues.reset();
        self.device.reset();
    }
}

fn half(value: u64, sel: u32) -> u32 {
    match sel {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}
