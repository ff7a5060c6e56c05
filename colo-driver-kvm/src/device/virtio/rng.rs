//! Entropy for the guest (virtio 1.2 section 5.4): a ring of empty buffers, filled from the host's generator.
//!
//! Each host gives its own: what a guest draws differs between primary and secondary until the next checkpoint.

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::backend::Saved;
use super::chain::Chain;
use super::{Backend, ConfigSpace, Queues};
use crate::device::LoadError;
use crate::device::codec::{Decoder, Encoder};
use crate::memory::GuestRam;

const QUEUE: u16 = 64;
/// Most bytes given to one request; the guest sees how many it got and asks again.
const MOST_BYTES: usize = 4096;

/// A virtio entropy source; [`Virtio<Rng>`](super::Virtio) is the device.
#[derive(Debug, Default)]
pub struct Rng {
    chain: Chain,
    given: u64,
}

impl Rng {
    /// A source that gave nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes given since creation.
    #[must_use]
    pub fn given(&self) -> u64 {
        self.given
    }

    fn fill(&mut self, ram: &GuestRam, chain: &Chain) -> usize {
        let mut bytes = [0; MOST_BYTES];
        let most = chain.writable.len().min(MOST_BYTES);
        let bytes = bytes.get_mut(..most).unwrap_or_default();
        // Does not wait: without entropy, which is only at the host's own boot, the guest gets nothing and asks again.
        let got = getrandom(&mut *bytes, GetRandomFlags::NONBLOCK).unwrap_or(0);
        let bytes = bytes.get(..got).unwrap_or_default();
        match chain.writable.write(ram, 0, bytes) {
            Ok(()) => {
                self.given += got as u64;
                got
            }
            Err(_) => 0,
        }
    }
}

impl Backend for Rng {
    const ID: u32 = VIRTIO_ID_RNG;

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE]
    }

    fn config(&self) -> ConfigSpace {
        ConfigSpace::new()
    }

    fn serve(&mut self, queues: &mut Queues) -> bool {
        let mut chain = std::mem::take(&mut self.chain);
        let left = queues.serve(0, &mut chain, QUEUE.into(), |ram, chain| {
            self.fill(ram, chain)
        });
        self.chain = chain;
        left
    }
}

/// Nothing of its own: requests are in the ring.
impl Saved for Rng {
    type State = ();

    fn save(&self, _: &mut Encoder<'_>) {}

    fn decode(&self, _: &mut Decoder<'_>) -> Result<(), LoadError> {
        Ok(())
    }

    fn apply(&mut self, (): ()) {}
}

#[cfg(test)]
mod tests {
    use super::super::test_utils::*;
    use super::*;
    use crate::device::test_utils::{assert_refuses_damage, saved};

    #[test]
    fn a_request_is_filled_and_two_differ() {
        let mut driver = Driver::up(Rng::new(), 0);
        driver.post(0, &[Buf::In(BUFFERS, 20), Buf::In(BUFFERS + 20, 12)]);
        driver.post(0, &[Buf::In(BUFFERS + 32, 32)]);
        driver.notify(0);
        assert_eq!(driver.completed(0), Some((0, 32)));
        assert_eq!(driver.completed(0), Some((2, 32)));
        let (one, two) = (driver.bytes(BUFFERS, 32), driver.bytes(BUFFERS + 32, 32));
        assert_ne!(one, two);
        assert_ne!(one, [0; 32]);
        assert!(driver.interrupted());
    }

    #[test]
    fn a_huge_request_gets_a_part_and_a_wrong_one_nothing() {
        let mut driver = Driver::up(Rng::new(), 0);
        driver.post(0, &[Buf::In(BUFFERS, 0x8000)]);
        driver.post(0, &[Buf::In(RAM, 32)]);
        driver.post(0, &[Buf::Out(BUFFERS, 32)]);
        driver.notify(0);
        let written: Vec<_> = (0..3).map(|_| driver.completed(0).unwrap().1).collect();
        assert_eq!(written, [4096, 0, 0]);
        assert_eq!(driver.mmio.device().given(), 4096);
    }

    #[test]
    fn a_checkpoint_carries_the_rings() {
        let mut one = Driver::up(Rng::new(), 0);
        one.post(0, &[Buf::In(BUFFERS, 32)]);
        let mut two = Driver::new(Rng::new());
        one.checkpoint_into(&mut two);
        assert_eq!(one.completed(0), Some((0, 32)));
        assert_eq!(two.completed(0), Some((0, 32)));
        let bytes = saved(&one.mmio);
        assert_refuses_damage(&mut two.mmio, &bytes);
    }
}
