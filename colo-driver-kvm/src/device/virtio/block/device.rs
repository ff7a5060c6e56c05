//! What the guest sees: capacity, limits, features.

use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vmm_sys_util::eventfd::EventFd;

use super::super::chain::Chain;
use super::super::{Backend, ConfigSpace, Queues};
use super::disk::{Disk, SECTOR};
use super::flush::Flusher;
use super::metrics::BlockMetrics;

const QUEUE: u16 = 128;
/// Most buffers of a request, and most bytes of each; a driver keeps to them.
const SEG_MAX: u32 = 126;
const SIZE_MAX: u32 = 128 << 10;
/// Most bytes of a request; more is refused.
pub(super) const MOST_DATA: usize = SEG_MAX as usize * SIZE_MAX as usize;
/// Most ranges of a discard, and most sectors of each range.
pub(super) const MOST_RANGES: u32 = 16;
pub(super) const MOST_DISCARD: u32 = 1 << 21;
/// Where the file system cannot, zeroes are written one by one.
pub(super) const MOST_ZEROES: u32 = 32 << 10;
/// What moves between the file and guest RAM at once.
pub(super) const BOUNCE: usize = 64 << 10;

/// A virtio disk; [`Virtio<Block>`](super::super::Virtio) is the device.
#[derive(Debug)]
pub struct Block {
    pub(super) disk: Arc<Disk>,
    pub(super) id: [u8; VIRTIO_BLK_ID_BYTES as usize],
    pub(super) chain: Chain,
    pub(super) bounce: Box<[u8]>,
    pub(super) flusher: Flusher,
    pub(super) metrics: BlockMetrics,
}

impl Block {
    /// A disk device over an image. `id` is the serial number the guest can read, cut to 20 bytes.
    #[must_use]
    pub fn new(disk: Arc<Disk>, id: &str) -> Self {
        let mut bytes = [0; VIRTIO_BLK_ID_BYTES as usize];
        bytes
            .iter_mut()
            .zip(id.bytes())
            .for_each(|(to, from)| *to = from);
        Self {
            disk,
            id: bytes,
            chain: Chain::default(),
            bounce: vec![0; BOUNCE].into_boxed_slice(),
            flusher: Flusher::default(),
            metrics: BlockMetrics::default(),
        }
    }

    /// The image, for a checkpoint.
    #[must_use]
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Counters.
    #[must_use]
    pub fn metrics(&self) -> BlockMetrics {
        self.metrics
    }

    pub(super) fn sectors(&self) -> u64 {
        self.disk.len() / SECTOR
    }
}

impl Backend for Block {
    const ID: u32 = VIRTIO_ID_BLOCK;

    fn features(&self) -> u64 {
        let always =
            1 << VIRTIO_BLK_F_SIZE_MAX | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_FLUSH;
        if self.disk.is_read_only() {
            always | 1 << VIRTIO_BLK_F_RO
        } else {
            always | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE]
    }

    fn config(&self) -> ConfigSpace {
        ConfigSpace::new()
            .with(0, &self.sectors().to_le_bytes())
            .with(8, &SIZE_MAX.to_le_bytes())
            .with(12, &SEG_MAX.to_le_bytes())
            .with(36, &MOST_DISCARD.to_le_bytes())
            .with(40, &MOST_RANGES.to_le_bytes())
            .with(44, &1u32.to_le_bytes()) // discard alignment, in sectors
            .with(48, &MOST_ZEROES.to_le_bytes())
            .with(52, &1u32.to_le_bytes()) // ranges of one write of zeroes
            .with(56, &[1]) // which may let go of the range
    }

    fn serve(&mut self, queues: &mut Queues) -> bool {
        let mut chain = std::mem::take(&mut self.chain);
        // Requests behind a flush wait for it.
        let left = queues.serve_until(0, &mut chain, QUEUE.into(), |ram, chain| {
            self.request(ram, chain)
        });
        self.chain = chain;
        left
    }

    fn connect(&mut self, wake: EventFd) {
        self.flusher.connect(wake);
    }

    fn reset(&mut self) {
        self.flusher.forget();
    }
}
