//! What the loop calls. Frames are moved here; everything else is the worker's.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd as _, RawFd},
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, channel},
    },
    thread,
    time::Duration,
};

use crate::config::Config;
use bytes::Bytes;
use colo_driver_kvm::{device::virtio::Offloads, memory::Memory};
use colo_driver_mio::{
    Guest, Wake, clock,
    guest::{Happened, MemoryError, Ready, Tokens, Vectors},
};
use colo_proto::{
    id::Epoch,
    machine::{Body, GuestDone, GuestOp, Notify, Sink as Place},
    member::Permit,
    ram::PageSet,
};
use mio::{Interest, Registry, unix::SourceFd};

use super::{
    announcer::Announcer,
    backend::{self, Backend},
    build::{Built, Card, DISK},
    worker::{Ended, Kept, Order, Orders, Worker, lock},
};
use crate::cli::Failure;

const CARD: usize = 0;
const OUTSIDE: usize = 1;
/// What the worker looks at: vCPUs that have something to say, devices with requests left.
const LOOK: usize = 2;
/// Frames taken from either side before the loop gets on with other things.
const TURN: usize = 128;
/// Device state that is received without moving the buffer.
const STATE_MOST: usize = 64 << 20;

/// How long the end waits for whoever reads the console.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Bytes of guest RAM made resident by one call.
const POPULATED_AT_ONCE: usize = 4 << 20;

/// A KVM machine behind the loop.
pub(crate) struct KvmGuest {
    /// Until the loop takes over.
    built: Option<(Built, Receiver<Order>)>,
    worker: Option<Worker>,
    orders: Orders,
    memory: Memory,
    outgoing: Kept,
    incoming: Kept,
    card: Option<Card>,
    console: colo_driver_kvm::device::Sink,
    backend: Backend,
    /// What the backend was told the guest can do.
    offloads: Offloads,
    announcer: Announcer,
    wake: Option<Wake>,
    buffer: Vec<u8>,
    iovecs: Vec<libc::iovec>,
    card_fd: Option<RawFd>,
    look_fds: Vec<RawFd>,
    card_ready: bool,
    outside_ready: bool,
    /// Frames of the guest, oldest first.
    out: VecDeque<(Epoch, Bytes)>,
    /// Newest epoch that the machine has been told of: a frame after it comes later.
    told: Epoch,
    on_end: Box<dyn FnMut(Option<Ended>) + Send>,
}

impl KvmGuest {
    /// Prepares a machine for the loop. `on_end` is told when the guest will not go on, and `None` when another
    /// state has been loaded in its place.
    pub(crate) fn new(
        config: &Config,
        built: Built,
        on_end: impl FnMut(Option<Ended>) + Send + 'static,
    ) -> Result<Self, Failure> {
        let vm = &built.vm;
        let pages: u64 = vm.shape().slots.iter().map(|slot| slot.1).sum();
        let limit = u32::try_from(pages).unwrap_or(u32::MAX);
        let outgoing = Arc::new(Mutex::new(vm.checkpoint(limit)?));
        let mut coming = vm.checkpoint(limit)?;
        coming.state = Vec::with_capacity(STATE_MOST);
        let (orders, inbox) = channel();
        let card_fd = built
            .card
            .as_ref()
            .map(|card| lock(card).wake_fd().as_raw_fd());
        Ok(Self {
            memory: vm.memory().clone(),
            outgoing,
            incoming: Arc::new(Mutex::new(coming)),
            card: built.card.clone(),
            console: built.console.clone(),
            backend: Backend::open(&config.net)?,
            offloads: Offloads::default(),
            announcer: Announcer::new(config),
            wake: None,
            buffer: backend::buffer(),
            iovecs: Vec::new(),
            card_fd,
            look_fds: built
                .served
                .fds()
                .chain([vm.event_fd().as_raw_fd()])
                .collect(),
            card_ready: true,
            outside_ready: true,
            out: VecDeque::new(),
            told: Epoch(0),
            on_end: Box::new(on_end),
            built: Some((built, inbox)),
            worker: None,
            orders,
        })
    }

    /// Makes all of guest RAM resident, in the background: a secondary will receive every page, and
    /// a page that is there already is received at twice the speed.
    pub(crate) fn populate(&self) -> Result<(), Failure> {
        let mut slots = self.memory.shape();
        slots.retain(|(slot, _)| *slot < DISK);
        let mut all = PageSet::new(&slots);
        all.fill();
        let (memory, runs) = (self.memory.clone(), all.take_runs(u32::MAX, usize::MAX));
        thread::Builder::new()
            .name("populate".into())
            .spawn(move || {
                let mut pieces = Vec::new();
                if memory.iovecs(&runs, &mut pieces).is_err() {
                    return;
                }
                for piece in pieces {
                    // In steps: the kernel holds the address space for as long as a step takes, and
                    // nobody else can start a thread or map a page meanwhile.
                    for at in (0..piece.iov_len).step_by(POPULATED_AT_ONCE) {
                        let len = POPULATED_AT_ONCE.min(piece.iov_len - at);
                        let start = piece.iov_base.wrapping_byte_add(at);
                        // SAFETY: guest RAM, mapped for as long as `memory` is; populating changes
                        // no byte of it. Advice: a kernel that refuses costs speed only.
                        unsafe { libc::madvise(start, len, libc::MADV_POPULATE_WRITE) };
                    }
                }
            })?;
        Ok(())
    }

    /// A way to the machine's thread, for what is not the loop's business.
    pub(crate) fn orders(&self) -> Orders {
        self.orders.clone()
    }

    /// The worker's next report. A capture and a load let the frames after them through.
    fn next_report(&mut self) -> Option<Happened> {
        let worker = self.worker.as_ref()?;
        while let Ok(ended) = worker.ended.try_recv() {
            (self.on_end)(ended);
        }
        let happened = worker.happened.try_recv().ok()?;
        if let Happened::Done(done) = &happened {
            match done {
                GuestDone::Captured(captured) => self.told = captured.epoch,
                GuestDone::StateLoaded(epoch) => {
                    self.told = *epoch;
                    // What the replaced guest said is nobody's.
                    self.out.clear();
                    self.match_offloads();
                }
                _ => {}
            }
        }
        Some(happened)
    }

    fn take_frames(&mut self) {
        if let Some(card) = self.card.as_ref().filter(|_| self.card_ready) {
            // What does not fit this turn makes the eventfd readable again.
            self.card_ready = false;
            let out = &mut self.out;
            lock(card).poll_tx(TURN, &mut |epoch, frame| {
                out.push_back((Epoch(epoch), frame));
            });
            self.match_offloads();
        }
    }

    /// Tells the backend what the guest's driver has agreed to. A driver that comes or goes rings, and a frame that
    /// the host made before it heard of it is dropped by the card.
    fn match_offloads(&mut self) {
        let Some(card) = &self.card else { return };
        let agreed = lock(card).guest_offloads();
        if agreed != self.offloads {
            // As often as the guest likes.
            tracing::debug!(
                checksum = agreed.checksum,
                segmentation = agreed.segmentation,
                "net: what the guest lets the host leave undone"
            );
            self.backend.set_offloads(agreed);
            self.offloads = agreed;
        }
    }

    fn say_where(&mut self) {
        for frame in self.announcer.poll() {
            self.backend.send(frame);
        }
    }

    fn vouch(&mut self, into: &mut Vectors) {
        for piece in self.iovecs.drain(..) {
            // SAFETY: guest RAM and staging areas are mapped for as long as this guest lives, which
            // the loop outlives by nothing; both are only ever touched through raw pointers.
            unsafe { into.push(piece.iov_base.cast(), piece.iov_len) };
        }
    }
}

impl Guest for KvmGuest {
    fn attach(&mut self, registry: &Registry, tokens: Tokens, wake: Wake) -> io::Result<()> {
        let card = self.card_fd.map(|fd| (CARD, fd));
        let outside = self.backend.fd().map(|fd| (OUTSIDE, fd));
        let look = self.look_fds.iter().map(|&fd| (LOOK, fd));
        for (index, fd) in card.into_iter().chain(outside).chain(look) {
            registry.register(&mut SourceFd(&fd), tokens.get(index), Interest::READABLE)?;
        }
        if let Some((built, inbox)) = self.built.take() {
            let (outgoing, incoming) = (Arc::clone(&self.outgoing), Arc::clone(&self.incoming));
            let orders = (self.orders.clone(), inbox);
            self.wake = Some(wake.clone());
            self.worker = Some(Worker::start(built, outgoing, incoming, orders, wake)?);
        }
        Ok(())
    }

    fn ready(&mut self, index: usize, _: Ready) {
        match index {
            CARD => self.card_ready = true,
            OUTSIDE => self.outside_ready = true,
            LOOK => {
                if let Some(worker) = &self.worker {
                    worker.order(Order::Look);
                }
            }
            _ => {}
        }
    }

    fn start(&mut self, op: GuestOp) {
        if matches!(op, GuestOp::Pause | GuestOp::Capture { .. }) {
            self.announcer.end();
        }
        if let Some(worker) = &self.worker {
            worker.order(Order::Do(op));
        }
    }

    fn poll(&mut self) -> Option<Happened> {
        self.say_where();
        // The worker first: a frame after a capture must not be seen before the capture is.
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
        if self.outside_ready {
            match self.backend.recv(&mut self.buffer) {
                Some(frame) => return Some(Happened::FromWorld(frame)),
                None => self.outside_ready = false,
            }
        }
        None
    }

    fn to_guest(&mut self, index: u64, frame: Bytes) {
        if let Some(card) = &self.card {
            lock(card).rx(index, &frame);
        }
    }

    fn to_world(&mut self, frame: Bytes, permit: Permit) {
        if permit.allows(clock::now()) {
            self.backend.send(&frame);
        }
    }

    fn announce(&mut self) {
        self.announcer.begin(self.wake.as_ref());
        self.say_where();
    }

    fn notify(&mut self, notify: Notify) {
        match notify {
            Notify::Serves => self.console.set_muted(false),
            Notify::Shadows => self.console.set_muted(true),
            _ => {}
        }
    }

    fn source(&mut self, body: &Body, into: &mut Vectors) -> Result<(), MemoryError> {
        let kept = lock(&self.outgoing);
        let found = match body {
            Body::Live(runs) => self
                .memory
                .iovecs(runs, &mut self.iovecs)
                .map_err(|error| error.to_string()),
            Body::Staged(runs) => kept
                .staging
                .iovecs(runs, &mut self.iovecs)
                .map_err(|error| error.to_string()),
            Body::State(range) => {
                let bytes = usize::try_from(range.start)
                    .ok()
                    .zip(usize::try_from(range.end).ok())
                    .and_then(|(start, end)| kept.state.get(start..end));
                bytes.map_or_else(
                    || Err(format!("{range:?} of {} bytes of state", kept.state.len())),
                    |bytes| {
                        self.iovecs.push(libc::iovec {
                            iov_base: bytes.as_ptr().cast_mut().cast(),
                            iov_len: bytes.len(),
                        });
                        Ok(())
                    },
                )
            }
            _ => Ok(()),
        };
        drop(kept);
        found.map_err(|what| refused(what, "it was not captured"))?;
        self.vouch(into);
        Ok(())
    }

    fn sink(&mut self, sink: &Place, into: &mut Vectors) -> Result<(), MemoryError> {
        let mut kept = lock(&self.incoming);
        let found = match sink {
            Place::Guest(runs) => self
                .memory
                .iovecs(runs, &mut self.iovecs)
                .map_err(|error| error.to_string()),
            Place::Cache(runs) => kept
                .staging
                .reserve(runs)
                .and_then(|()| kept.staging.iovecs(runs, &mut self.iovecs))
                .map_err(|error| error.to_string()),
            Place::State(range) => {
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
                        self.iovecs.push(libc::iovec {
                            iov_base: bytes.as_mut_ptr().cast(),
                            iov_len: bytes.len(),
                        });
                    }
                    Ok(())
                }
            }
            _ => Err("a place of a newer protocol".into()),
        };
        drop(kept);
        found.map_err(|what| refused(what, "the machine has no such place"))?;
        self.vouch(into);
        Ok(())
    }
}

impl Drop for KvmGuest {
    fn drop(&mut self) {
        if !self.console.drain(LAST_WORDS) {
            tracing::warn!("nobody reads the console; its last output is lost");
        }
    }
}

fn refused(what: String, why: &'static str) -> MemoryError {
    MemoryError { what, why }
}
