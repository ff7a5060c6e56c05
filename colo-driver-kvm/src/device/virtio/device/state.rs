//! The life cycle and the section: transport, rings, then the device's own fields.
//!
//! Requests in flight need no place in it: every call completes what it popped, so between calls a request is either
//! in the available ring or in the used ring, and both are guest RAM.

use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::super::backend::Saved;
use super::super::queues::Queues;
use super::super::ring::{Cursor, Ring};
use super::Virtio;
use super::negotiation::STATUS;
use crate::device::codec::{Decoder, Encoder};
use crate::device::{LoadError, Persist};
use crate::memory::GuestRam;

const VERSION: u16 = 1;

impl<D: Saved> Persist for Virtio<D> {
    fn section(&self) -> &str {
        &self.section
    }

    fn version(&self) -> u16 {
        VERSION
    }

    fn quiesce(&mut self) {
        self.queues.quiesced = true;
        self.queues.interrupts.hold();
    }

    fn save(&self, out: &mut Vec<u8>) {
        let mut encoder = Encoder::new(&self.section, VERSION, out);
        encoder.u32(D::ID);
        encoder.u64(self.offered());
        encoder.u32(self.status);
        encoder.u64(self.driver_features);
        encoder.u32(self.device_features_sel);
        encoder.u32(self.driver_features_sel);
        encoder.u32(self.queue_sel);
        encoder.bool(self.queues.broken);
        encoder.u32(self.queues.interrupt_status);
        encoder.u32(self.queues.config_generation);
        for ring in &self.queues.rings {
            let cursor = ring.cursor();
            encoder.u16(ring.max);
            encoder.u16(ring.size);
            encoder.bool(ring.is_ready());
            encoder.u64(ring.descriptors);
            encoder.u64(ring.available);
            encoder.u64(ring.used);
            encoder.u16(cursor.next_available);
            encoder.u16(cursor.next_used);
        }
        self.device.save(&mut encoder);
        encoder.seal();
    }

    fn check(&self, version: u16, bytes: &[u8]) -> Result<(), LoadError> {
        decode(self, version, bytes).map(drop)
    }

    fn load(&mut self, version: u16, bytes: &[u8]) -> Result<(), LoadError> {
        let Loaded {
            status,
            driver_features,
            device_features_sel,
            driver_features_sel,
            queue_sel,
            broken,
            interrupt_status,
            config_generation,
            rings,
            device,
        } = decode(self, version, bytes)?;
        self.status = status;
        self.driver_features = driver_features;
        self.device_features_sel = device_features_sel;
        self.driver_features_sel = driver_features_sel;
        self.queue_sel = queue_sel;
        self.queues = Queues {
            ram: self.queues.ram.clone(),
            interrupts: self.queues.interrupts.clone(),
            rings,
            features: agreed(status, driver_features),
            driver_up: status & VIRTIO_CONFIG_S_DRIVER_OK != 0,
            broken,
            quiesced: self.queues.quiesced,
            interrupt_status,
            config_generation,
            malformed: self.queues.malformed,
        };
        self.device.apply(device);
        // Both belong to what was here before; `resume` makes its own.
        self.queues.interrupts.forget();
        self.drain_wake();
        self.loaded = true;
        Ok(())
    }

    fn reset(&mut self, _: &[u8]) {
        self.power_on();
        self.queues.interrupts.forget();
        self.drain_wake();
    }

    fn resume(&mut self) {
        if !self.queues.quiesced {
            return;
        }
        self.queues.quiesced = false;
        let loaded = std::mem::take(&mut self.loaded);
        let Queues {
            interrupts,
            interrupt_status,
            ..
        } = &self.queues;
        interrupts.release();
        interrupts.raise_again(*interrupt_status, loaded);
        self.kick();
    }
}

struct Loaded<S> {
    status: u32,
    driver_features: u64,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
    broken: bool,
    interrupt_status: u32,
    config_generation: u32,
    rings: Vec<Ring>,
    device: S,
}

fn decode<D: Saved>(
    here: &Virtio<D>,
    version: u16,
    bytes: &[u8],
) -> Result<Loaded<D::State>, LoadError> {
    let mut decoder = Decoder::open(&here.section, VERSION, version, bytes)?;
    let id = decoder.u32("device id")?;
    decoder.same("device id", id.into(), D::ID.into())?;
    let offered = decoder.u64("features offered")?;
    decoder.same("features offered", offered, here.offered())?;
    let status = decoder.u32("status")?;
    if status & !STATUS != 0 {
        return Err(decoder.invalid("status", status.into(), "known bits only"));
    }
    let driver_features = decoder.u64("driver features")?;
    let features = agreed(status, driver_features);
    if features & !offered != 0 {
        return Err(decoder.invalid("driver features", driver_features, "offered ones only"));
    }
    let device_features_sel = decoder.u32("device feature select")?;
    let driver_features_sel = decoder.u32("driver feature select")?;
    let queue_sel = decoder.u32("queue select")?;
    let broken = decoder.bool("needs reset")?;
    let interrupt_status = decoder.u32("interrupt status")?;
    let config_generation = decoder.u32("config generation")?;
    let mut rings = Vec::with_capacity(here.queues.rings.len());
    for ring in &here.queues.rings {
        rings.push(decode_ring(
            &mut decoder,
            &here.queues.ram,
            ring.max,
            features,
        )?);
    }
    let device = here.device.decode(&mut decoder)?;
    decoder.end()?;
    Ok(Loaded {
        status,
        driver_features,
        device_features_sel,
        driver_features_sel,
        queue_sel,
        broken,
        interrupt_status,
        config_generation,
        rings,
        device,
    })
}

fn decode_ring(
    decoder: &mut Decoder<'_>,
    ram: &GuestRam,
    max: u16,
    features: u64,
) -> Result<Ring, LoadError> {
    let got = decoder.u16("longest queue size")?;
    decoder.same("longest queue size", got.into(), max.into())?;
    let mut ring = Ring::new(max);
    ring.size = decoder.u16("queue size")?;
    let ready = decoder.bool("queue ready")?;
    ring.descriptors = decoder.u64("descriptor table")?;
    ring.available = decoder.u64("available ring")?;
    ring.used = decoder.u64("used ring")?;
    let cursor = Cursor {
        next_available: decoder.u16("next available")?,
        next_used: decoder.u16("next used")?,
    };
    let event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
    if ready && !ring.start(ram, cursor, event_idx) {
        let at = ring.descriptors;
        return Err(decoder.invalid("descriptor table", at, "that of a ring inside guest RAM"));
    }
    Ok(ring)
}

/// Features count once the device has accepted them.
fn agreed(status: u32, driver_features: u64) -> u64 {
    if status & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
        driver_features
    } else {
        0
    }
}
