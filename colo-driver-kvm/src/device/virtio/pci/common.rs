//! The registers in the BAR: common configuration, interrupt status, the device's configuration, notifications.

use super::super::mmio::{replace_high, replace_low};
use super::super::{Backend, Virtio};
use crate::device::pci::Msix;

// Where the parts are; each begins a page, so that a host can map them apart.
pub(super) const COMMON: u64 = 0;
pub(super) const COMMON_LEN: u64 = 0x38;
pub(super) const ISR: u64 = 0x1000;
pub(super) const DEVICE: u64 = 0x2000;
pub(super) const DEVICE_LEN: u64 = 0x1000;
pub(super) const NOTIFY: u64 = 0x3000;
pub(super) const NOTIFY_LEN: u64 = 4;

// Fields of the common configuration, by offset and width (virtio 1.2 section 4.1.4.3).
const DEVICE_FEATURE_SELECT: (u64, usize) = (0x00, 4);
const DEVICE_FEATURE: (u64, usize) = (0x04, 4);
const DRIVER_FEATURE_SELECT: (u64, usize) = (0x08, 4);
const DRIVER_FEATURE: (u64, usize) = (0x0c, 4);
const CONFIG_VECTOR: (u64, usize) = (0x10, 2);
const NUM_QUEUES: (u64, usize) = (0x12, 2);
const STATUS: (u64, usize) = (0x14, 1);
const GENERATION: (u64, usize) = (0x15, 1);
const QUEUE_SELECT: (u64, usize) = (0x16, 2);
const QUEUE_SIZE: (u64, usize) = (0x18, 2);
const QUEUE_VECTOR: (u64, usize) = (0x1a, 2);
const QUEUE_ENABLE: (u64, usize) = (0x1c, 2);
const QUEUE_NOTIFY_OFF: (u64, usize) = (0x1e, 2);
const QUEUE_DESC_LOW: (u64, usize) = (0x20, 4);
const QUEUE_DESC_HIGH: (u64, usize) = (0x24, 4);
const QUEUE_DRIVER_LOW: (u64, usize) = (0x28, 4);
const QUEUE_DRIVER_HIGH: (u64, usize) = (0x2c, 4);
const QUEUE_DEVICE_LOW: (u64, usize) = (0x30, 4);
const QUEUE_DEVICE_HIGH: (u64, usize) = (0x34, 4);

/// Reads one field; an access of another width finds none.
pub(super) fn read<D: Backend>(
    device: &Virtio<D>,
    messages: &Msix,
    at: u64,
    len: usize,
) -> Option<u32> {
    let ring = device.ring();
    let sel = usize::try_from(device.queue_sel).unwrap_or(usize::MAX);
    let address = |part: fn(u64) -> u32, of: fn(&super::super::ring::Ring) -> u64| {
        ring.map_or(0, |ring| part(of(ring)))
    };
    let (low, high) = (|all: u64| all as u32, |all: u64| (all >> 32) as u32);
    Some(match (at, len) {
        DEVICE_FEATURE_SELECT => device.device_features_sel,
        DEVICE_FEATURE => device.offered_half(),
        DRIVER_FEATURE_SELECT => device.driver_features_sel,
        DRIVER_FEATURE => device.driver_half(),
        CONFIG_VECTOR => messages.config_vector().into(),
        NUM_QUEUES => device.queues.rings.len() as u32,
        STATUS => device.status(),
        GENERATION => device.queues.config_generation & 0xff,
        QUEUE_SELECT => device.queue_sel,
        QUEUE_SIZE => ring.map_or(0, |ring| ring.size.into()),
        QUEUE_VECTOR => messages.ring_vector(sel).into(),
        QUEUE_ENABLE => ring.is_some_and(|ring| ring.is_ready()).into(),
        // All rings are notified at the same place, so that one ioeventfd serves them.
        QUEUE_NOTIFY_OFF => 0,
        QUEUE_DESC_LOW => address(low, |ring| ring.descriptors),
        QUEUE_DESC_HIGH => address(high, |ring| ring.descriptors),
        QUEUE_DRIVER_LOW => address(low, |ring| ring.available),
        QUEUE_DRIVER_HIGH => address(high, |ring| ring.available),
        QUEUE_DEVICE_LOW => address(low, |ring| ring.used),
        QUEUE_DEVICE_HIGH => address(high, |ring| ring.used),
        _ => return None,
    })
}

/// Writes one field; an access of another width is ignored, as is one to a field that can only be read.
pub(super) fn write<D: Backend>(
    device: &mut Virtio<D>,
    messages: &Msix,
    at: u64,
    len: usize,
    value: u32,
) {
    let half = value as u16;
    let sel = usize::try_from(device.queue_sel).unwrap_or(usize::MAX);
    match (at, len) {
        DEVICE_FEATURE_SELECT => device.device_features_sel = value,
        DRIVER_FEATURE_SELECT => device.driver_features_sel = value,
        DRIVER_FEATURE => device.set_driver_features(value),
        CONFIG_VECTOR => messages.assign_config(half),
        STATUS => device.set_status(value),
        QUEUE_SELECT => device.queue_sel = value,
        QUEUE_VECTOR => messages.assign_ring(sel, half),
        // A driver stops a ring by a reset only.
        QUEUE_ENABLE if value == 1 => device.start_ring(),
        _ => {
            let Some(ring) = device.idle_ring() else {
                return;
            };
            match (at, len) {
                QUEUE_SIZE => ring.size = half,
                QUEUE_DESC_LOW => replace_low(&mut ring.descriptors, value),
                QUEUE_DESC_HIGH => replace_high(&mut ring.descriptors, value),
                QUEUE_DRIVER_LOW => replace_low(&mut ring.available, value),
                QUEUE_DRIVER_HIGH => replace_high(&mut ring.available, value),
                QUEUE_DEVICE_LOW => replace_low(&mut ring.used, value),
                QUEUE_DEVICE_HIGH => replace_high(&mut ring.used, value),
                _ => {}
            }
        }
    }
}
