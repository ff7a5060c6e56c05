//! A demand in flight: the place, then small bytes, in one vector; partial reads resumed.
//!
//! Never more is read than was demanded, so nothing is ever moved: what the machine did not ask
//! for stays in the socket, and that is also the back-pressure.

use core::num::NonZeroUsize;
use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

use bytes::BytesMut;
use colo_proto::machine::{Demand, Sink};

use super::send::PIECES_MOST;
use crate::{
    guest::{Guest, MemoryError, Vectors},
    pool::Pool,
};

/// Longest frame or small read that is believed. The machine has its own limits; this one keeps a
/// fault in it from taking all memory.
const OWN_MOST: usize = 1 << 20;

/// What the next bytes of one channel are for.
#[derive(Debug, Default)]
pub(crate) struct Receiving {
    vectors: Vectors,
    /// First piece that is not full.
    at: usize,
    place: usize,
    place_left: usize,
    small: Vec<u8>,
    frame: Option<BytesMut>,
    own_left: usize,
}

/// Something that was received whole.
#[derive(Debug)]
pub(crate) enum Received {
    /// All of the place is filled.
    Placed(NonZeroUsize),
    /// All small bytes are there; to be given back with [`Receiving::give_back`].
    Bytes(Vec<u8>),
    /// The frame is whole.
    Frame(BytesMut),
}

impl Receiving {
    /// Nothing is demanded.
    pub(crate) const fn is_idle(&self) -> bool {
        self.place == 0 && self.own_left == 0 && self.frame.is_none() && self.small.is_empty()
    }

    /// Bytes that one read may yield.
    pub(crate) const fn wanted(&self) -> usize {
        self.place_left + self.own_left
    }

    /// Begins a demand; `false` when it is a pause.
    pub(crate) fn begin(
        &mut self,
        demand: &Demand,
        guest: &mut impl Guest,
        pool: &mut Pool,
    ) -> Result<bool, MemoryError> {
        self.vectors.clear();
        self.at = 0;
        match demand {
            Demand::Frame(len) => {
                within(len.get())?;
                self.frame = Some(pool.frame(len.get()));
                self.own_left = len.get();
            }
            Demand::Read { place, then } => {
                within(*then)?;
                if let Some(sink) = place {
                    let want = sink_len(sink);
                    guest.sink(sink, &mut self.vectors)?;
                    if self.vectors.bytes() != want {
                        return Err(MemoryError {
                            what: format!("{sink:?}"),
                            why: "the guest gave another number of bytes",
                        });
                    }
                    self.place = usize::try_from(want).unwrap_or(usize::MAX);
                    self.place_left = self.place;
                }
                self.small.resize(*then, 0);
                self.own_left = *then;
            }
            _ => return Ok(false),
        }
        let own = match &mut self.frame {
            Some(frame) => frame.as_mut(),
            None => self.small.as_mut_slice(),
        };
        // SAFETY: the buffer is neither moved, resized nor read before all of it is received: it
        // is given away by `take` only when nothing is left of the demand.
        unsafe { self.vectors.push(own.as_mut_ptr(), own.len()) };
        Ok(self.wanted() > 0)
    }

    /// One `readv`; yields how many bytes came, zero when the peer has closed.
    pub(crate) fn read(&mut self, from: impl AsFd) -> io::Result<usize> {
        let pieces = self.vectors.from(self.at);
        let count = pieces.len().min(PIECES_MOST);
        // SAFETY: the pieces are writable: our own buffer is exclusively ours until it is taken,
        // the guest's memory is promised by the contract of `Vectors::push`.
        let got = unsafe {
            libc::readv(
                from.as_fd().as_raw_fd(),
                pieces.as_ptr(),
                i32::try_from(count).unwrap_or(i32::MAX),
            )
        };
        let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
        self.at = self.vectors.skip(self.at, got);
        let placed = got.min(self.place_left);
        self.place_left -= placed;
        self.own_left = self.own_left.saturating_sub(got - placed);
        Ok(got)
    }

    /// What has become whole: the place first, then what follows it.
    pub(crate) fn take(&mut self) -> Option<Received> {
        if self.place_left > 0 {
            return None;
        }
        if let Some(placed) = NonZeroUsize::new(std::mem::take(&mut self.place)) {
            return Some(Received::Placed(placed));
        }
        if self.own_left > 0 {
            return None;
        }
        if let Some(frame) = self.frame.take() {
            return Some(Received::Frame(frame));
        }
        if self.small.is_empty() {
            return None;
        }
        Some(Received::Bytes(std::mem::take(&mut self.small)))
    }

    /// Takes the allocation of [`Received::Bytes`] back.
    pub(crate) fn give_back(&mut self, mut small: Vec<u8>) {
        if self.small.capacity() == 0 {
            small.clear();
            self.small = small;
        }
    }
}

fn within(len: usize) -> Result<(), MemoryError> {
    if len <= OWN_MOST {
        return Ok(());
    }
    Err(MemoryError {
        what: format!("{len} bytes at once"),
        why: "more than the limit of 1 MiB",
    })
}

fn sink_len(sink: &Sink) -> u64 {
    match sink {
        Sink::Guest(runs) | Sink::Cache(runs) => runs.bytes(),
        Sink::State(range) => range.end.saturating_sub(range.start),
        _ => 0,
    }
}
