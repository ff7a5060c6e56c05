//! The MMIO transport, version 2: registers (virtio 1.2 section 4.2.2) in front of a device.

use virtio_bindings::virtio_mmio::*;

use super::{Backend, Virtio};
use crate::device::BusDevice;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"colo");

impl<D: Backend> Virtio<D> {
    /// Bytes of address space a device on MMIO takes.
    pub const MMIO_LEN: u64 = 0x1000;
    /// Where its notify register is, for an ioeventfd of 4 bytes (any value).
    pub const MMIO_NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

    fn register(&self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => D::ID,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => self.offered_half(),
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.ring().map_or(0, |ring| ring.max.into()),
            VIRTIO_MMIO_QUEUE_READY => self.ring().is_some_and(|ring| ring.is_ready()).into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.queues.interrupt_status,
            VIRTIO_MMIO_STATUS => self.status(),
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
            VIRTIO_MMIO_QUEUE_READY => match value {
                0 => self.stop_ring(),
                1 => self.start_ring(),
                _ => {}
            },
            VIRTIO_MMIO_QUEUE_NUM..=VIRTIO_MMIO_QUEUE_USED_HIGH => self.set_ring(offset, value),
            _ => {}
        }
    }

    fn set_ring(&mut self, offset: u32, value: u32) {
        let Some(ring) = self.idle_ring() else {
            return;
        };
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
}

/// Registers take aligned accesses of four bytes; others are ignored. The configuration space takes any.
impl<D: Backend> BusDevice for Virtio<D> {
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

pub(super) fn replace_low(value: &mut u64, low: u32) {
    *value = *value >> 32 << 32 | u64::from(low);
}

pub(super) fn replace_high(value: &mut u64, high: u32) {
    *value = u64::from(high) << 32 | *value & u64::from(u32::MAX);
}
