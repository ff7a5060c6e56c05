//! One request (virtio 1.2 section 5.2.6): a header to read, data either way, a status byte to write.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::super::chain::{Chain, OutOfChain};
use super::device::{BOUNCE, Block, MOST_DATA, MOST_DISCARD, MOST_RANGES, MOST_ZEROES};
use super::disk::SECTOR;
use crate::memory::GuestRam;

/// Header: type, reserved, sector.
const HEADER: usize = 16;
/// A range of a discard: sector, sectors, flags.
const RANGE: usize = 16;

/// Why a request is answered with an error.
enum Refused {
    /// No such request type.
    Unsupported,
    /// It makes no sense, or the file said no.
    Failed,
    /// It is being done.
    NotYet,
}

impl From<OutOfChain> for Refused {
    fn from(_: OutOfChain) -> Self {
        Self::Failed
    }
}

impl From<std::io::Error> for Refused {
    /// The disk remembers the error itself.
    fn from(_: std::io::Error) -> Self {
        Self::Failed
    }
}

impl Block {
    /// Answers one request. Returns how many bytes of it were written, from its start; `None` where it cannot be
    /// answered yet.
    pub(super) fn request(&mut self, ram: &GuestRam, chain: &Chain) -> Option<usize> {
        // The status byte is the last the device may write; without one nothing can be answered.
        let Some(room) = chain.writable.len().checked_sub(1) else {
            self.metrics.errors += 1;
            return Some(0);
        };
        let (status, written) = match self.execute(ram, chain, room) {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Refused::NotYet) => return None,
            Err(refused) => {
                self.metrics.errors += 1;
                match refused {
                    Refused::Unsupported => (VIRTIO_BLK_S_UNSUPP, 0),
                    Refused::Failed | Refused::NotYet => (VIRTIO_BLK_S_IOERR, 0),
                }
            }
        };
        Some(match chain.writable.write(ram, room, &[status as u8]) {
            // Counted from the start: without the data before it, the status byte does not count.
            Ok(()) if written == room => room + 1,
            _ => written,
        })
    }

    fn execute(&mut self, ram: &GuestRam, chain: &Chain, room: usize) -> Result<usize, Refused> {
        let mut header = [0; HEADER];
        chain.readable.read(ram, 0, &mut header)?;
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let data = chain.readable.len() - HEADER;
        match u32::from_le_bytes([a, b, c, d]) {
            VIRTIO_BLK_T_IN => self.read(ram, chain, sector, room),
            VIRTIO_BLK_T_OUT => self.write(ram, chain, sector, data),
            VIRTIO_BLK_T_FLUSH => {
                self.flusher.poll(&self.disk).ok_or(Refused::NotYet)??;
                self.metrics.flushes += 1;
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => {
                let id = self.id.get(..room).unwrap_or(&self.id);
                chain.writable.write(ram, 0, id)?;
                Ok(id.len())
            }
            kind @ (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) => {
                self.trim(ram, chain, kind == VIRTIO_BLK_T_WRITE_ZEROES, data)
            }
            _ => Err(Refused::Unsupported),
        }
    }

    fn read(
        &mut self,
        ram: &GuestRam,
        chain: &Chain,
        sector: u64,
        len: usize,
    ) -> Result<usize, Refused> {
        let at = self.range(sector, len)?;
        for (done, piece) in pieces(len) {
            let bytes = self.bounce.get_mut(..piece).ok_or(Refused::Failed)?;
            self.disk.read(at + done as u64, bytes)?;
            chain.writable.write(ram, done, bytes)?;
        }
        self.metrics.reads += 1;
        self.metrics.read_bytes += len as u64;
        Ok(len)
    }

    fn write(
        &mut self,
        ram: &GuestRam,
        chain: &Chain,
        sector: u64,
        len: usize,
    ) -> Result<usize, Refused> {
        let at = self.range(sector, len)?;
        if self.disk.is_read_only() {
            return Err(Refused::Failed);
        }
        for (done, piece) in pieces(len) {
            let bytes = self.bounce.get_mut(..piece).ok_or(Refused::Failed)?;
            chain.readable.read(ram, HEADER + done, bytes)?;
            self.disk.write(at + done as u64, bytes)?;
        }
        self.metrics.writes += 1;
        self.metrics.written_bytes += len as u64;
        Ok(0)
    }

    /// Discards or zeroes the ranges in the data; all are checked before the first is touched.
    fn trim(
        &mut self,
        ram: &GuestRam,
        chain: &Chain,
        zeroes: bool,
        len: usize,
    ) -> Result<usize, Refused> {
        let (most_ranges, most_sectors) = if zeroes {
            (1, MOST_ZEROES)
        } else {
            (MOST_RANGES as usize, MOST_DISCARD)
        };
        if self.disk.is_read_only() {
            return Err(Refused::Unsupported);
        }
        if len == 0 || !len.is_multiple_of(RANGE) || len / RANGE > most_ranges {
            return Err(Refused::Failed);
        }
        let mut ranges = [(0, 0, false); MOST_RANGES as usize];
        for (index, slot) in ranges.iter_mut().enumerate().take(len / RANGE) {
            let mut range = [0; RANGE];
            chain
                .readable
                .read(ram, HEADER + RANGE * index, &mut range)?;
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = range;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes(flags);
            let known = if zeroes {
                VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
            } else {
                0
            };
            if flags & !known != 0 {
                return Err(Refused::Unsupported);
            }
            let at = sector.checked_mul(SECTOR).ok_or(Refused::Failed)?;
            let bytes = u64::from(sectors) * SECTOR;
            if sectors > most_sectors || !self.disk.contains(at, bytes) {
                return Err(Refused::Failed);
            }
            *slot = (at, bytes, flags != 0);
        }
        for (at, bytes, unmap) in ranges.into_iter().filter(|&(_, bytes, _)| bytes > 0) {
            if zeroes {
                self.disk.write_zeroes(at, bytes, unmap)?;
            } else {
                self.disk.discard(at, bytes);
            }
        }
        self.metrics.trims += 1;
        Ok(0)
    }

    /// Where a transfer begins in the image.
    fn range(&self, sector: u64, len: usize) -> Result<u64, Refused> {
        let at = sector.checked_mul(SECTOR).ok_or(Refused::Failed)?;
        let whole = (len as u64).is_multiple_of(SECTOR) && len <= MOST_DATA;
        if whole && self.disk.contains(at, len as u64) {
            Ok(at)
        } else {
            Err(Refused::Failed)
        }
    }
}

/// Offsets and lengths of what moves at once.
fn pieces(len: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..len)
        .step_by(BOUNCE)
        .map(move |at| (at, BOUNCE.min(len - at)))
}
