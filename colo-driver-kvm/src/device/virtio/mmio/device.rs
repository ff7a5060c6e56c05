//! The registers (virtio 1.2 section 4.2.2), negotiation and reset.

use std::io;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::ring::{Cursor, Ring};
use super::super::{Backend, Queues};
use crate::device::{BusDevice, Irq};
use crate::memory::GuestRam;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"colo");
/// What a driver may set; NEEDS_RESET is the device's.
pub(super) const STATUS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_FAILED;

/// A virtio device on the MMIO bus: the transport in front of `D`.
///
/// Put it on the bus with [`LEN`](Self::LEN) addresses, aligned to that, register [`irq`](Self::irq) as an irqfd, and
/// tell the guest both (kernel command line `virtio_mmio.device=4K@0xd0000000:5`, or what the boot path has).
/// [`wake_fd`](Self::wake_fd) may be registered as an ioeventfd; without it a notification is an ordinary exit.
#[derive(Debug)]
pub struct Mmio<D> {
    pub(super) section: String,
    pub(in super::super) device: D,
    pub(in super::super) queues: Queues,
    pub(super) wake: EventFd,
    pub(super) status: u32,
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    pub(super) driver_features: u64,
    pub(super) queue_sel: u32,
}

impl<D: Backend> Mmio<D> {
    /// Bytes of address space a device takes.
    pub const LEN: u64 = 0x1000;
    /// Where the notify register is, for an ioeventfd of 4 bytes (any value).
    pub const NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

    /// A device after reset. `section` names its state (`"virtio-net0"`).
    ///
    /// # Errors
    ///
    /// Out of descriptors.
    pub fn new(section: &str, device: D, ram: GuestRam, irq: Irq) -> io::Result<Self> {
        let queues = Queues::new(device.queue_sizes(), ram, irq);
        Ok(Self {
            section: section.into(),
            device,
            queues,
            wake: EventFd::new(EFD_NONBLOCK)?,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
        })
    }

    /// The device behind the transport.
    #[must_use]
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The interrupt line, to register as an irqfd.
    #[must_use]
    pub fn irq(&self) -> &Irq {
        &self.queues.irq
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

    fn ring(&self) -> Option<&Ring> {
        self.queues.rings.get(usize::try_from(self.queue_sel).ok()?)
    }

    fn register(&self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => D::ID,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(self.offered(), self.device_features_sel),
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.ring().map_or(0, |ring| ring.max.into()),
            VIRTIO_MMIO_QUEUE_READY => self.ring().is_some_and(Ring::is_ready).into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.queues.interrupt_status,
            VIRTIO_MMIO_STATUS if self.queues.broken => self.status | VIRTIO_CONFIG_S_NEEDS_RESET,
            VIRTIO_MMIO_STATUS => self.status,
            // No shared memory: a region that does not exist has length and base -1.
            VIRTIO_MMIO_SHM_LEN_LOW..=VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            VIRTIO_MMIO_CONFIG_GENERATION => self.queues.config_generation,
            _ => 0,
        }
    }

    fn set_register(&mut self, offset: u32, value: u32) {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.set_driver_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => self.kick(),
            VIRTIO_MMIO_INTERRUPT_ACK => self.queues.interrupt_status &= !value,
            VIRTIO_MMIO_STATUS => self.set_status(value),
            VIRTIO_MMIO_QUEUE_NUM..=VIRTIO_MMIO_QUEUE_USED_HIGH => self.set_ring(offset, value),
            _ => {}
        }
    }

    fn set_driver_features(&mut self, value: u32) {
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

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
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

    fn set_ring(&mut self, offset: u32, value: u32) {
        let event_idx = self.queues.event_idx();
        let Queues { rings, ram, .. } = &mut self.queues;
        let Some(ring) = usize::try_from(self.queue_sel)
            .ok()
            .and_then(|sel| rings.get_mut(sel))
        else {
            return;
        };
        if offset == VIRTIO_MMIO_QUEUE_READY {
            match (value, ring.is_ready()) {
                (1, false) => {
                    let start = Cursor {
                        next_available: 0,
                        next_used: 0,
                    };
                    // A ring programmed wrongly does not become ready, which the driver reads back.
                    let _started = ring.start(ram, start, event_idx);
                }
                (0, true) => ring.stop(),
                _ => {}
            }
            return;
        }
        if ring.is_ready() {
            return;
        }
        match offset {
            // A size that does not fit is as wrong as zero.
            VIRTIO_MMIO_QUEUE_NUM => ring.size = u16::try_from(value).unwrap_or(0),
            VIRTIO_MMIO_QUEUE_DESC_LOW => replace_low(&mut ring.descriptors, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => replace_high(&mut ring.descriptors, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => replace_low(&mut ring.available, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => replace_high(&mut ring.available, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => replace_low(&mut ring.used, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => replace_high(&mut ring.used, value),
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        self.queues.reset();
        self.device.reset();
    }
}

/// Registers take aligned accesses of four bytes; others are ignored. The configuration space takes any.
impl<D: Backend> BusDevice for Mmio<D> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let config = u64::from(VIRTIO_MMIO_CONFIG);
        if let Some(offset) = offset.checked_sub(config) {
            self.device.config().read(offset, data);
        } else if let (Some(offset), Ok(data)) = (aligned(offset), data.try_into()) {
            let data: &mut [u8; 4] = data;
            *data = self.register(offset).to_le_bytes();
        }
    }

    /// No configuration space here has a field the driver may write.
    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Some(offset), Ok(data)) = (aligned(offset), data.try_into()) {
            self.set_register(offset, u32::from_le_bytes(data));
        }
    }
}

fn aligned(offset: u64) -> Option<u32> {
    let offset = u32::try_from(offset).ok()?;
    (offset < VIRTIO_MMIO_CONFIG && offset.is_multiple_of(4)).then_some(offset)
}

fn half(value: u64, sel: u32) -> u32 {
    match sel {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn replace_low(value: &mut u64, low: u32) {
    *value = *value >> 32 << 32 | u64::from(low);
}

fn replace_high(value: &mut u64, high: u32) {
    *value = u64::from(high) << 32 | *value & u64::from(u32::MAX);
}
