//! A driver: programs a device through its registers and keeps rings and buffers in the guest RAM they share.
//!
//! virtio-queue's own mock never wraps, and lays the used ring over the end of the available ring.

use std::num::Wrapping;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes as _, GuestAddress};

use super::Virtio;
use super::backend::Saved;
use crate::device::test_utils::saved;
use crate::device::{BusDevice as _, Irq, Persist as _};
use crate::memory::GuestRam;

/// Entries of every ring: few, so that tests wrap.
pub(crate) const RING: u16 = 16;
/// Where buffers may lie.
pub(crate) const BUFFERS: u64 = 0x8_0000;
pub(crate) const RAM: u64 = 0x10_0000;

pub(crate) const ACKNOWLEDGE: u32 = 1;
pub(crate) const DRIVER: u32 = 2;
pub(crate) const DRIVER_OK: u32 = 4;
pub(crate) const FEATURES_OK: u32 = 8;
pub(crate) const NEEDS_RESET: u32 = 64;

/// A buffer of a request.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Buf {
    /// The device reads it.
    Out(u64, u32),
    /// The device writes it.
    In(u64, u32),
}

pub(crate) struct Driver<D> {
    pub(crate) mmio: Virtio<D>,
    pub(crate) ram: GuestRam,
    rings: Vec<Cursor>,
}

/// A driver's place in a ring.
#[derive(Clone, Copy, Default)]
struct Cursor {
    descriptor: u16,
    available: Wrapping<u16>,
    used: Wrapping<u16>,
}

impl<D: Saved> Driver<D> {
    /// A device nobody has touched.
    pub(crate) fn new(device: D) -> Self {
        let size = usize::try_from(RAM).unwrap();
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), size)]).unwrap();
        let rings = vec![Cursor::default(); device.queue_sizes().len()];
        let mmio = Virtio::new("virtio0", device, ram.clone(), Irq::new().unwrap()).unwrap();
        Self { mmio, ram, rings }
    }

    /// A device brought up with the features asked for.
    pub(crate) fn up(device: D, features: u64) -> Self {
        let mut driver = Self::new(device);
        driver.initialise(features);
        driver
    }

    /// Virtio 1.2 section 3.1.1, step by step.
    pub(crate) fn initialise(&mut self, features: u64) {
        self.set(VIRTIO_MMIO_STATUS, 0);
        self.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
        self.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
        self.set_features(features | 1 << VIRTIO_F_VERSION_1);
        self.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_ne!(self.get(VIRTIO_MMIO_STATUS) & FEATURES_OK, 0, "refused");
        for ring in 0..self.rings.len() {
            self.set_ring(ring, RING, ring_base(ring));
            self.set(VIRTIO_MMIO_QUEUE_READY, 1);
            assert_eq!(self.get(VIRTIO_MMIO_QUEUE_READY), 1);
        }
        self.rings.fill(Cursor::default());
        let all = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
        self.set(VIRTIO_MMIO_STATUS, all);
        assert_eq!(self.get(VIRTIO_MMIO_STATUS), all);
    }

    pub(crate) fn set_features(&mut self, features: u64) {
        for (sel, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, sel);
            self.set(VIRTIO_MMIO_DRIVER_FEATURES, half);
        }
    }

    pub(crate) fn features(&mut self) -> u64 {
        let mut half = |sel| {
            self.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, sel);
            u64::from(self.get(VIRTIO_MMIO_DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    pub(crate) fn set_ring(&mut self, ring: usize, size: u16, base: u64) {
        self.set(VIRTIO_MMIO_QUEUE_SEL, u32::try_from(ring).unwrap());
        self.set(VIRTIO_MMIO_QUEUE_NUM, size.into());
        for (low, offset) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, 0),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, AVAILABLE),
            (VIRTIO_MMIO_QUEUE_USED_LOW, USED),
        ] {
            let address = base.wrapping_add(offset);
            self.set(low, address as u32);
            self.set(low + 4, (address >> 32) as u32);
        }
    }

    pub(crate) fn set(&mut self, register: u32, value: u32) {
        self.mmio.write(register.into(), &value.to_le_bytes());
    }

    pub(crate) fn get(&mut self, register: u32) -> u32 {
        let mut data = [0xff; 4];
        self.mmio.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes the descriptors of a request; the device cannot see it yet.
    pub(crate) fn lay(&mut self, ring: usize, bufs: &[Buf]) -> u16 {
        let base = ring_base(ring);
        let head = self.rings[ring].descriptor;
        for (at, buf) in bufs.iter().enumerate() {
            let index = (head + u16::try_from(at).unwrap()) % RING;
            let (address, len, mut flags) = match *buf {
                Buf::Out(address, len) => (address, len, 0),
                Buf::In(address, len) => (address, len, VRING_DESC_F_WRITE),
            };
            if at + 1 < bufs.len() {
                flags |= VRING_DESC_F_NEXT;
            }
            let next = (index + 1) % RING;
            self.store_descriptor(ring, index, address, len, flags as u16, next);
        }
        self.rings[ring].descriptor = (head + u16::try_from(bufs.len()).unwrap()) % RING;
        assert!(base < BUFFERS);
        head
    }

    pub(crate) fn store_descriptor(
        &self,
        ring: usize,
        index: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let at = ring_base(ring) + 16 * u64::from(index);
        self.ram.write_obj(address, GuestAddress(at)).unwrap();
        self.ram.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.ram.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.ram.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes a request visible.
    pub(crate) fn publish(&mut self, ring: usize, head: u16) {
        let base = ring_base(ring) + AVAILABLE;
        let cursor = &mut self.rings[ring];
        let slot = base + 4 + 2 * u64::from(cursor.available.0 % RING);
        cursor.available += 1;
        self.ram.write_obj(head, GuestAddress(slot)).unwrap();
        let index = cursor.available.0;
        self.ram.write_obj(index, GuestAddress(base + 2)).unwrap();
    }

    /// Lays and publishes, without a notification.
    pub(crate) fn post(&mut self, ring: usize, bufs: &[Buf]) -> u16 {
        let head = self.lay(ring, bufs);
        self.publish(ring, head);
        head
    }

    pub(crate) fn notify(&mut self, ring: usize) {
        self.set(VIRTIO_MMIO_QUEUE_NOTIFY, u32::try_from(ring).unwrap());
    }

    /// The next completed request: its head, and how many bytes the device wrote.
    pub(crate) fn completed(&mut self, ring: usize) -> Option<(u32, u32)> {
        let base = ring_base(ring) + USED;
        let index: u16 = self.ram.read_obj(GuestAddress(base + 2)).unwrap();
        let cursor = &mut self.rings[ring];
        if cursor.used.0 == index {
            return None;
        }
        let slot = base + 4 + 8 * u64::from(cursor.used.0 % RING);
        cursor.used += 1;
        let head = self.ram.read_obj(GuestAddress(slot)).unwrap();
        let len = self.ram.read_obj(GuestAddress(slot + 4)).unwrap();
        Some((head, len))
    }

    /// The field of the available ring with which the driver holds interrupts back: flags, or `used_event`.
    pub(crate) fn set_available(&self, ring: usize, offset: u64, value: u16) {
        let at = ring_base(ring) + AVAILABLE + offset;
        self.ram.write_obj(value, GuestAddress(at)).unwrap();
    }

    pub(crate) fn used_field(&self, ring: usize, offset: u64) -> u16 {
        let at = ring_base(ring) + USED + offset;
        self.ram.read_obj(GuestAddress(at)).unwrap()
    }

    pub(crate) fn put(&self, at: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub(crate) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// Whether an interrupt came since the last call.
    pub(crate) fn interrupted(&self) -> bool {
        self.mmio.interrupts().line().unwrap().fd().read().is_ok()
    }

    /// Whether the loop was woken since the last call.
    pub(crate) fn woken(&self) -> bool {
        self.mmio.wake_fd().read().is_ok()
    }

    /// Checkpoints this machine into another: RAM, driver and device.
    pub(crate) fn checkpoint_into(&mut self, other: &mut Self) {
        self.mmio.quiesce();
        let section = saved(&self.mmio);
        other.mmio.quiesce();
        let ram = self.bytes(0, usize::try_from(RAM).unwrap());
        other.put(0, &ram);
        other.rings.clone_from(&self.rings);
        other.mmio.load(self.mmio.version(), &section).unwrap();
        assert_eq!(saved(&other.mmio), section, "saving again gives the same");
        other.mmio.resume();
        self.mmio.resume();
    }
}

const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x4000;

pub(crate) fn ring_base(ring: usize) -> u64 {
    0x1_0000 * (ring as u64 + 1)
}
