//! One request as the guest laid it out: the buffers of a descriptor chain, read and written by offset.

use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes as _, GuestAddress};

use crate::memory::GuestRam;

/// Most buffers of one request. No ring here is longer, so no honest chain is.
pub(crate) const MOST_SEGMENTS: usize = 256;

/// A buffer that is not in guest RAM, or an offset past the end of the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OutOfChain;

/// The buffers of one request; kept and filled again, so that serving allocates nothing.
///
/// The guest may change the descriptors at any time. They are read once, here; what a device checked is what it uses.
#[derive(Debug, Default)]
pub(crate) struct Chain {
    head: u16,
    /// What the device reads.
    pub(crate) readable: Segments,
    /// What the device writes.
    pub(crate) writable: Segments,
}

impl Chain {
    /// Takes the descriptors of `chain`. Returns whether it ended as it should: `false` for a loop, for a link or a
    /// table outside RAM, and for more than [`MOST_SEGMENTS`].
    pub(super) fn fill(&mut self, chain: DescriptorChain<&GuestRam>) -> bool {
        self.head = chain.head_index();
        self.readable.clear();
        self.writable.clear();
        let mut open = true;
        for descriptor in chain.take(MOST_SEGMENTS) {
            open = descriptor.has_next();
            if descriptor.is_write_only() {
                self.writable.push(&descriptor);
            } else {
                self.readable.push(&descriptor);
            }
        }
        !open
    }

    pub(super) fn head(&self) -> u16 {
        self.head
    }
}

/// Buffers of one direction, in order.
#[derive(Debug, Default)]
pub(crate) struct Segments {
    list: Vec<(GuestAddress, usize)>,
    len: usize,
}

impl Segments {
    /// Bytes in all of them; at most 4 GiB, since a longer chain ends early.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Fills `into` from byte `at` on.
    pub(crate) fn read(
        &self,
        ram: &GuestRam,
        at: usize,
        into: &mut [u8],
    ) -> Result<(), OutOfChain> {
        let mut rest = into;
        self.walk(at, rest.len(), |address, len| {
            let (head, tail) = std::mem::take(&mut rest)
                .split_at_mut_checked(len)
                .ok_or(OutOfChain)?;
            rest = tail;
            ram.read_slice(head, address).map_err(|_| OutOfChain)
        })
    }

    /// Writes `from` at byte `at`; the pages are logged as dirty.
    pub(crate) fn write(&self, ram: &GuestRam, at: usize, from: &[u8]) -> Result<(), OutOfChain> {
        let mut rest = from;
        self.walk(at, rest.len(), |address, len| {
            let (head, tail) = rest.split_at_checked(len).ok_or(OutOfChain)?;
            rest = tail;
            ram.write_slice(head, address).map_err(|_| OutOfChain)
        })
    }

    fn walk(
        &self,
        at: usize,
        len: usize,
        mut piece: impl FnMut(GuestAddress, usize) -> Result<(), OutOfChain>,
    ) -> Result<(), OutOfChain> {
        let (mut skip, mut left) = (at, len);
        for &(address, len) in &self.list {
            if left == 0 {
                break;
            }
            if skip >= len {
                skip -= len;
                continue;
            }
            let count = (len - skip).min(left);
            let start = address.0.checked_add(skip as u64).ok_or(OutOfChain)?;
            piece(GuestAddress(start), count)?;
            (skip, left) = (0, left - count);
        }
        if left == 0 { Ok(()) } else { Err(OutOfChain) }
    }

    fn clear(&mut self) {
        self.list.clear();
        self.len = 0;
    }

    fn push(&mut self, descriptor: &Descriptor) {
        let len = descriptor.len() as usize;
        self.list.push((descriptor.addr(), len));
        self.len += len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments(list: &[(u64, usize)]) -> Segments {
        Segments {
            list: list.iter().map(|&(a, l)| (GuestAddress(a), l)).collect(),
            len: list.iter().map(|&(_, l)| l).sum(),
        }
    }

    fn ram() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap()
    }

    #[test]
    fn offsets_run_through_the_buffers_in_order() {
        let ram = ram();
        let segments = segments(&[(0x100, 3), (0x50, 0), (0x200, 5), (0x80, 2)]);
        segments.write(&ram, 0, b"0123456789").unwrap();
        let mut got = [0; 6];
        segments.read(&ram, 2, &mut got).unwrap();
        assert_eq!(&got, b"234567");
        let mut second = [0; 5];
        ram.read_slice(&mut second, GuestAddress(0x200)).unwrap();
        assert_eq!(&second, b"34567");
    }

    #[test]
    fn past_the_end_and_outside_ram_are_errors() {
        let ram = ram();
        let mut two = [0; 2];
        assert_eq!(segments(&[(0, 3)]).read(&ram, 2, &mut two), Err(OutOfChain));
        assert_eq!(
            segments(&[(0, 3)]).read(&ram, usize::MAX, &mut two),
            Err(OutOfChain)
        );
        for address in [0x1fff, 0x2000, u64::MAX - 1, u64::MAX] {
            let segments = segments(&[(address, 16)]);
            assert_eq!(segments.read(&ram, 0, &mut two), Err(OutOfChain));
            assert_eq!(segments.write(&ram, 4, &two), Err(OutOfChain));
        }
    }
}
