//! Messages in flight: heads and bodies as one vector, partial writes resumed.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

use bytes::Bytes;
use colo_proto::machine::{Body, Transmit};

use crate::guest::{Guest, MemoryError, Vectors};

/// Most pieces of one `writev` (`IOV_MAX`).
pub(super) const PIECES_MOST: usize = 1024;

/// What was handed out for one channel and has not been taken by the kernel.
#[derive(Debug, Default)]
pub(crate) struct Sending {
    vectors: Vectors,
    /// First piece that is not all sent.
    at: usize,
    left: u64,
    /// Keeps the memory of heads and frames alive.
    keep: Vec<Bytes>,
    /// Whether any piece is the guest's memory.
    guest_memory: bool,
}

impl Sending {
    /// Nothing is in flight.
    pub(crate) const fn is_empty(&self) -> bool {
        self.left == 0
    }

    /// Bytes in flight.
    pub(crate) const fn left(&self) -> u64 {
        self.left
    }

    /// Whether another message fits into the same `writev`.
    pub(crate) fn has_room(&self) -> bool {
        self.vectors.len() < PIECES_MOST / 2
    }

    /// Whether what is in flight lives here, so that it can be sent after the guest's memory is
    /// no longer promised.
    pub(crate) const fn is_own(&self) -> bool {
        !self.guest_memory
    }

    /// Appends a message.
    pub(crate) fn push(
        &mut self,
        transmit: Transmit,
        guest: &mut impl Guest,
    ) -> Result<(), MemoryError> {
        let len = transmit.len();
        self.own(transmit.head);
        match transmit.body {
            Body::Empty => {}
            Body::Bytes(frame) => self.own(frame),
            body => {
                self.guest_memory = true;
                let (before, want) = (self.vectors.bytes(), body_len(&body));
                guest.source(&body, &mut self.vectors)?;
                if self.vectors.bytes() - before != want {
                    return Err(MemoryError {
                        what: format!("{body:?}"),
                        why: "the guest gave another number of bytes",
                    });
                }
            }
        }
        self.left += len;
        Ok(())
    }

    fn own(&mut self, bytes: Bytes) {
        // SAFETY: `keep` holds the buffer until everything is sent; it is only read.
        unsafe { self.vectors.push(bytes.as_ptr().cast_mut(), bytes.len()) };
        self.keep.push(bytes);
    }

    /// One `writev`; yields how many bytes the kernel took.
    pub(crate) fn write(&mut self, to: impl AsFd) -> io::Result<usize> {
        let pieces = self.vectors.from(self.at);
        let count = pieces.len().min(PIECES_MOST);
        // SAFETY: the pieces are readable: our own are kept in `keep`, the guest's are promised by
        // the contract of `Vectors::push` until they are sent.
        let sent = unsafe {
            libc::writev(
                to.as_fd().as_raw_fd(),
                pieces.as_ptr(),
                i32::try_from(count).unwrap_or(i32::MAX),
            )
        };
        let sent = usize::try_from(sent).map_err(|_| io::Error::last_os_error())?;
        self.at = self.vectors.skip(self.at, sent);
        self.left = self.left.saturating_sub(sent as u64);
        if self.left == 0 {
            self.vectors.clear();
            self.keep.clear();
            self.at = 0;
            self.guest_memory = false;
        }
        Ok(sent)
    }
}

fn body_len(body: &Body) -> u64 {
    match body {
        Body::Live(runs) | Body::Staged(runs) => runs.bytes(),
        Body::State(range) => range.end.saturating_sub(range.start),
        Body::Bytes(bytes) => bytes.len() as u64,
        _ => 0,
    }
}
