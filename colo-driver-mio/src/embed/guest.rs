//! The loop's end: a [`Guest`] whose frames are moved here and whose operations the VMM's thread
//! carries out.

use std::{
    collections::VecDeque,
    fmt, io,
    os::fd::OwnedFd,
    sync::{
        Arc,
        mpsc::{Receiver, Sender},
    },
};

use bytes::Bytes;
use colo_driver_kvm::capture::{Pages, iovecs};
use colo_proto::{
    id::Epoch,
    machine::{Body, GuestDone, GuestOp, Notify, Sink},
    member::Permit,
};
use mio::{Interest, Registry, unix::SourceFd};

use super::{
    card::{Port, ring},
    orders::{Kept, lock},
    world::World,
};
use crate::{
    Guest, Wake, clock,
    guest::{Happened, MemoryError, Ready, Tokens, Vectors},
};

const CARD: usize = 0;
const WORLD: usize = 1;
/// Device state that is received without moving the buffer.
pub(super) const STATE_MOST: usize = 64 << 20;

/// Addresses on their way into [`Vectors`], kept for their memory; empty between calls.
#[derive(Default)]
pub(super) struct Scratch(Vec<libc::iovec>);

// SAFETY: there is nothing in it when it goes to another thread.
unsafe impl Send for Scratch {}

/// An embedded VM, as the loop has it.
pub struct EmbeddedGuest<P, W> {
    pub(super) pages: P,
    pub(super) port: Arc<dyn Port>,
    pub(super) world: W,
    pub(super) outgoing: Kept,
    pub(super) incoming: Kept,
    pub(super) orders: Sender<GuestOp>,
    pub(super) bell: Arc<OwnedFd>,
    pub(super) happened: Receiver<Happened>,
    pub(super) woken: Sender<Wake>,
    pub(super) iovecs: Scratch,
    /// Frames of the guest, oldest first.
    pub(super) out: VecDeque<(Epoch, Bytes)>,
    /// Newest epoch that the machine has been told of: a frame after it comes later.
    pub(super) told: Epoch,
    pub(super) card_ready: bool,
    pub(super) world_ready: bool,
}

impl<P: Pages, W: World> EmbeddedGuest<P, W> {
    /// The next report of the VMM's thread. A capture and a load let the frames after them through.
    fn next_report(&mut self) -> Option<Happened> {
        let happened = self.happened.try_recv().ok()?;
        match &happened {
            Happened::Done(GuestDone::Captured(captured)) => self.told = captured.epoch,
            Happened::Done(GuestDone::StateLoaded(epoch)) => {
                self.told = *epoch;
                // What the replaced guest said is nobody's.
                self.out.clear();
                self.world.card_rang();
            }
            _ => {}
        }
        Some(happened)
    }

    fn take_frames(&mut self) {
        if std::mem::take(&mut self.card_ready) {
            let out = &mut self.out;
            self.port
                .said(&mut |epoch, frame| out.push_back((epoch, frame)));
            self.world.card_rang();
        }
    }

    fn vouch(&mut self, into: &mut Vectors) {
        for piece in self.iovecs.0.drain(..) {
            // SAFETY: guest RAM is mapped for as long as `pages` is, staging areas and state buffers
            // for as long as this guest, which the loop outlives by nothing; all of it is touched
            // through raw pointers only while a transfer is on.
            unsafe { into.push(piece.iov_base.cast(), piece.iov_len) };
        }
    }
}

impl<P: Pages, W: World> Guest for EmbeddedGuest<P, W> {
    fn attach(&mut self, registry: &Registry, tokens: Tokens, wake: Wake) -> io::Result<()> {
        let card = self.port.descriptor().map(|fd| (CARD, fd));
        let world = self.world.descriptor().map(|fd| (WORLD, fd));
        for (index, fd) in card.into_iter().chain(world) {
            registry.register(&mut SourceFd(&fd), tokens.get(index), Interest::READABLE)?;
        }
        // The VMM's thread may have ended already: it will not need it.
        let _gone = self.woken.send(wake);
        Ok(())
    }

    fn ready(&mut self, index: usize, _: Ready) {
        match index {
            CARD => self.card_ready = true,
            WORLD => self.world_ready = true,
            _ => {}
        }
    }

    fn start(&mut self, op: GuestOp) {
        if self.orders.send(op).is_err() {
            tracing::error!("the VMM's thread is gone; the guest stands still");
        }
        ring(&self.bell);
    }

    fn poll(&mut self) -> Option<Happened> {
        // The thread first: a frame after a capture must not be seen before the capture is.
        if let Some(happened) = self.next_report() {
            return Some(happened);
        }
        if self.out.is_empty() {
            self.take_frames();
        }
        if self
            .out
            .front()
            .is_some_and(|(epoch, _)| *epoch <= self.told)
        {
            let (epoch, frame) = self.out.pop_front()?;
            return Some(Happened::FromGuest { epoch, frame });
        }
        if self.world_ready {
            match self.world.receive() {
                Some(frame) => return Some(Happened::FromWorld(frame)),
                None => self.world_ready = false,
            }
        }
        None
    }

    fn to_guest(&mut self, index: u64, frame: Bytes) {
        self.port.bring(index, frame);
    }

    fn to_world(&mut self, frame: Bytes, permit: Permit) {
        if permit.allows(clock::now()) {
            self.world.send(&frame);
        }
    }

    fn announce(&mut self) {
        self.world.announce();
    }

    fn notify(&mut self, notify: Notify) {
        self.world.notify(notify);
    }

    fn source(&mut self, body: &Body, into: &mut Vectors) -> Result<(), MemoryError> {
        // The VMM's thread holds the buffers while it captures; what is not in them waits for no one.
        let found = match body {
            Body::Live(runs) => {
                iovecs(&self.pages, runs, &mut self.iovecs.0).map_err(|error| error.to_string())
            }
            Body::Staged(runs) => lock(&self.outgoing)
                .staging
                .iovecs(runs, &mut self.iovecs.0)
                .map_err(|error| error.to_string()),
            Body::State(range) => {
                let kept = lock(&self.outgoing);
                let bytes = usize::try_from(range.start)
                    .ok()
                    .zip(usize::try_from(range.end).ok())
                    .and_then(|(start, end)| kept.state.get(start..end));
                bytes.map_or_else(
                    || Err(format!("{range:?} of {} bytes of state", kept.state.len())),
                    |bytes| {
                        self.iovecs.0.push(libc::iovec {
                            iov_base: bytes.as_ptr().cast_mut().cast(),
                            iov_len: bytes.len(),
                        });
                        Ok(())
                    },
                )
            }
            _ => Err("a body of a newer protocol".into()),
        };
        found.map_err(|what| refused(what, "it was not captured"))?;
        self.vouch(into);
        Ok(())
    }

    fn sink(&mut self, sink: &Sink, into: &mut Vectors) -> Result<(), MemoryError> {
        let found = match sink {
            Sink::Guest(runs) => self.world.make_room(runs).and_then(|()| {
                iovecs(&self.pages, runs, &mut self.iovecs.0).map_err(|error| error.to_string())
            }),
            Sink::Cache(runs) => {
                let mut kept = lock(&self.incoming);
                kept.staging
                    .reserve(runs)
                    .and_then(|()| kept.staging.iovecs(runs, &mut self.iovecs.0))
                    .map_err(|error| error.to_string())
            }
            Sink::State(range) => {
                let mut kept = lock(&self.incoming);
                let start = usize::try_from(range.start).unwrap_or(usize::MAX);
                let end = usize::try_from(range.end).unwrap_or(usize::MAX);
                if end > STATE_MOST || start > end {
                    Err(format!(
                        "{range:?} of device state, {STATE_MOST} bytes are the most"
                    ))
                } else {
                    // Within the capacity: bytes that are already there do not move. The first
                    // piece ends what an earlier epoch left.
                    if start == 0 {
                        kept.state.truncate(end);
                    }
                    let len = end.max(kept.state.len());
                    kept.state.resize(len, 0);
                    if let Some(bytes) = kept.state.get_mut(start..end) {
                        self.iovecs.0.push(libc::iovec {
                            iov_base: bytes.as_mut_ptr().cast(),
                            iov_len: bytes.len(),
                        });
                    }
                    Ok(())
                }
            }
            _ => Err("a place of a newer protocol".into()),
        };
        found.map_err(|what| refused(what, "the machine has no such place"))?;
        self.vouch(into);
        Ok(())
    }
}

impl<P, W> Drop for EmbeddedGuest<P, W> {
    /// The VMM's thread hears of the end.
    fn drop(&mut self) {
        let (closed, _) = std::sync::mpsc::channel();
        self.orders = closed;
        ring(&self.bell);
    }
}

impl<P, W> fmt::Debug for EmbeddedGuest<P, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedGuest")
            .field("told", &self.told)
            .field("waiting", &self.out.len())
            .finish_non_exhaustive()
    }
}

fn refused(what: String, why: &'static str) -> MemoryError {
    MemoryError { what, why }
}
