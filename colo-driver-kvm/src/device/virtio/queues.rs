//! What a device behind the transport works with: guest RAM, its rings, its interrupt.

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::chain::Chain;
use super::interrupts::Interrupts;
use super::ring::{Popped, Ring};
use crate::memory::GuestRam;

/// The rings of one device. Nothing in here touches guest memory unless the driver is up, the rings are sound, and
/// the device is not quiesced.
#[derive(Debug)]
pub struct Queues {
    pub(super) ram: GuestRam,
    pub(super) interrupts: Interrupts,
    pub(super) rings: Vec<Ring>,
    /// Features that both sides agreed on.
    pub(super) features: u64,
    /// The driver said DRIVER_OK.
    pub(super) driver_up: bool,
    /// The guest broke a ring; nothing works until it resets the device.
    pub(super) broken: bool,
    pub(super) quiesced: bool,
    pub(super) interrupt_status: u32,
    pub(super) config_generation: u32,
    pub(super) malformed: u64,
}

impl Queues {
    pub(super) fn new(sizes: &[u16], ram: GuestRam, interrupts: Interrupts) -> Self {
        Self {
            ram,
            interrupts,
            rings: sizes.iter().map(|&max| Ring::new(max)).collect(),
            features: 0,
            driver_up: false,
            broken: false,
            quiesced: false,
            interrupt_status: 0,
            config_generation: 0,
            malformed: 0,
        }
    }

    /// Whether requests can be served now.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.driver_up && !self.broken && !self.quiesced
    }

    /// Whether the driver is up and sane; it may be that the device is quiesced.
    #[must_use]
    pub fn has_driver(&self) -> bool {
        self.driver_up && !self.broken
    }

    /// Whether both sides agreed on feature number `bit`.
    #[must_use]
    pub fn agreed(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }

    /// Guest RAM.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Takes the next request of a ring. Malformed ones on the way are completed empty, at most a ring of them.
    pub(crate) fn pop(&mut self, index: usize, chain: &mut Chain) -> bool {
        if !self.is_live() {
            return false;
        }
        let Some(ring) = self.rings.get_mut(index) else {
            return false;
        };
        for _ in 0..=ring.max {
            let step = ring.pop(&self.ram, chain).and_then(|popped| {
                if popped == Popped::Malformed {
                    ring.complete(&self.ram, chain.head(), 0)?;
                }
                Ok(popped)
            });
            match step {
                Ok(Popped::Good) => return true,
                Ok(Popped::Nothing) => return false,
                Ok(Popped::Malformed) => self.malformed += 1,
                Err(_) => break,
            }
        }
        self.fail();
        false
    }

    /// Gives the request popped last back to the ring.
    pub(crate) fn unpop(&mut self, index: usize) {
        if let Some(ring) = self.rings.get_mut(index) {
            ring.unpop();
        }
    }

    /// Returns a request to the guest, `written` bytes of it filled. [`signal`](Self::signal) after the last.
    pub(crate) fn complete(&mut self, index: usize, chain: &Chain, written: usize) {
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        self.on_ring(index, |ring, ram| ring.complete(ram, chain.head(), written));
    }

    /// Interrupts the guest for the requests completed since the last call, if it wants to be.
    pub(crate) fn signal(&mut self, index: usize) {
        if self.on_ring(index, Ring::wants_interrupt) == Some(true) {
            self.interrupt_status |= VIRTIO_MMIO_INT_VRING;
            self.interrupts.ring(index);
        }
    }

    /// Asks the guest to notify the next request. Returns whether one is there already.
    pub(crate) fn arm(&mut self, index: usize) -> bool {
        self.on_ring(index, Ring::arm) == Some(true)
    }

    /// Tells the guest that it need not notify for now.
    pub(crate) fn disarm(&mut self, index: usize) {
        self.on_ring(index, Ring::disarm);
    }

    /// Serves at most `most` requests of a ring: `each` returns how many bytes it wrote. Returns whether requests are
    /// left.
    pub(crate) fn serve(
        &mut self,
        index: usize,
        chain: &mut Chain,
        most: usize,
        mut each: impl FnMut(&GuestRam, &Chain) -> usize,
    ) -> bool {
        self.serve_until(index, chain, most, |ram, chain| Some(each(ram, chain)))
    }

    /// The same, up to the first request for which `each` says `None`: that one stays in the ring, and is not counted
    /// as left, since whoever said so serves again when it can be answered.
    pub(crate) fn serve_until(
        &mut self,
        index: usize,
        chain: &mut Chain,
        most: usize,
        mut each: impl FnMut(&GuestRam, &Chain) -> Option<usize>,
    ) -> bool {
        let (mut served, mut waits) = (0, false);
        while served < most && self.pop(index, chain) {
            let Some(written) = each(&self.ram, chain) else {
                self.unpop(index);
                waits = true;
                break;
            };
            self.complete(index, chain, written);
            served += 1;
        }
        if served > 0 {
            self.signal(index);
        }
        self.arm(index) && !waits
    }

    /// Tells the guest that the configuration space changed.
    pub(crate) fn config_changed(&mut self) {
        self.config_generation = self.config_generation.wrapping_add(1);
        if self.driver_up {
            self.interrupt_config();
        }
    }

    pub(super) fn event_idx(&self) -> bool {
        self.agreed(VIRTIO_RING_F_EVENT_IDX)
    }

    pub(super) fn reset(&mut self) {
        self.rings.iter_mut().for_each(Ring::reset);
        self.features = 0;
        self.driver_up = false;
        self.broken = false;
        self.interrupt_status = 0;
        self.interrupts.reset();
    }

    fn interrupt_config(&mut self) {
        self.interrupt_status |= VIRTIO_MMIO_INT_CONFIG;
        self.interrupts.config();
    }

    fn fail(&mut self) {
        self.broken = true;
        if self.driver_up {
            self.interrupt_config();
        }
    }

    fn on_ring<T>(
        &mut self,
        index: usize,
        call: impl FnOnce(&mut Ring, &GuestRam) -> Result<T, virtio_queue::Error>,
    ) -> Option<T> {
        if !self.is_live() {
            return None;
        }
        let ring = self.rings.get_mut(index)?;
        match call(ring, &self.ram) {
            Ok(value) => Some(value),
            Err(_) => {
                self.fail();
                None
            }
        }
    }
}
