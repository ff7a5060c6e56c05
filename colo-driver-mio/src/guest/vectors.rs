//! Raw I/O vectors: pieces of memory that only the kernel touches.

use std::fmt;

/// A list of pieces of memory, in order.
///
/// It is a list of promises: whoever pushes a piece vouches for it until the loop is done with it.
#[derive(Default)]
pub struct Vectors {
    list: Vec<libc::iovec>,
    bytes: u64,
}

// SAFETY: the pieces are plain addresses; `push` demands that they are good from any thread.
unsafe impl Send for Vectors {}

impl Vectors {
    /// Appends a piece. Pieces that touch the last one are merged with it.
    ///
    /// # Safety
    /// From now until the loop has reported the bytes as sent or placed, or the channel has gone
    /// down or was hung up, `start..start + len` must be mapped for the whole process, readable
    /// for [`Guest::source`](super::Guest::source) and writable for
    /// [`Guest::sink`](super::Guest::sink), and be memory that other code touches only through raw
    /// pointers or atomics: the kernel reads or writes it at any moment of that time.
    pub unsafe fn push(&mut self, start: *mut u8, len: usize) {
        if len == 0 {
            return;
        }
        self.bytes += len as u64;
        if let Some(last) = self.list.last_mut()
            && last.iov_base.addr() + last.iov_len == start.addr()
        {
            last.iov_len += len;
            return;
        }
        self.list.push(libc::iovec {
            iov_base: start.cast(),
            iov_len: len,
        });
    }

    /// Bytes in all pieces.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many pieces.
    #[must_use]
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The pieces, for whoever moves their bytes without the loop: a test.
    pub fn pieces(&self) -> impl Iterator<Item = (*mut u8, usize)> + '_ {
        self.list
            .iter()
            .map(|piece| (piece.iov_base.cast(), piece.iov_len))
    }

    /// Forgets the pieces and keeps the allocation.
    pub(crate) fn clear(&mut self) {
        self.list.clear();
        self.bytes = 0;
    }

    /// The pieces from number `at` on, for a system call.
    pub(crate) fn from(&self, at: usize) -> &[libc::iovec] {
        self.list.get(at..).unwrap_or_default()
    }

    /// Skips `bytes` of the pieces from number `at` on; yields the number of the first piece that
    /// is not used up.
    pub(crate) fn skip(&mut self, mut at: usize, mut bytes: usize) -> usize {
        while let Some(piece) = self.list.get_mut(at) {
            if bytes < piece.iov_len {
                piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(bytes).cast();
                piece.iov_len -= bytes;
                break;
            }
            bytes -= piece.iov_len;
            at += 1;
        }
        at
    }
}

impl fmt::Debug for Vectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Vectors({} bytes in {})", self.bytes, self.list.len())
    }
}
