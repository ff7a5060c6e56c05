//! Buffers for received frames, cut from one block and given away.
//!
//! The machine keeps frames as reference-counted buffers for as long as it likes; when all frames
//! of a block are gone, `reserve` takes the block back instead of allocating a new one.

use bytes::BytesMut;

/// Size of a block: many frames, and small enough that one frame kept for long does not pin much.
const BLOCK: usize = 64 * 1024;

/// Cuts frames from a block.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    block: BytesMut,
}

impl Pool {
    /// A zeroed frame of `len` bytes.
    pub(crate) fn frame(&mut self, len: usize) -> BytesMut {
        if len > BLOCK / 4 {
            return BytesMut::zeroed(len);
        }
        if self.block.capacity() < len {
            self.block.reserve(BLOCK);
        }
        self.block.resize(len, 0);
        self.block.split_to(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_do_not_overlap_and_blocks_come_back() {
        let mut pool = Pool::default();
        let mut kept = pool.frame(1500);
        kept.fill(1);
        let other = pool.frame(1500);
        assert!(other.iter().all(|&b| b == 0));
        drop(other);
        assert!(kept.iter().all(|&b| b == 1));
        drop(kept);
        let mut blocks = Vec::new();
        for _ in 0..1000 {
            let start = pool.frame(BLOCK / 4).as_ptr() as usize;
            if !blocks.contains(&start) {
                blocks.push(start);
            }
        }
        assert!(blocks.len() <= 16, "{} different places", blocks.len());
    }
}
