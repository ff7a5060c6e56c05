//! A guest without a VM: RAM in this process's heap, a device state of a few numbers, and a
//! program that answers client frames. For tests, examples and benchmarks of the loop.
//!
//! What it does is what a real guest must do, in its simplest form: pages written are logged,
//! a capture copies them to a staging area and the rest of the guest to a state buffer, frames are
//! stamped with the last capture, a paused guest does nothing, and a permit is checked at the
//! write.

use core::{
    num::NonZeroU32,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};
use std::{
    collections::VecDeque,
    io,
    ops::Range,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time,
};

use bytes::{Bytes, BytesMut};
use colo_proto::{
    id::{Epoch, PAGE_SIZE, PageRun, PageRuns, Slot},
    machine::{Body, Captured, GuestDone, GuestOp, GuestOpKind, Sink},
    member::Permit,
};
use mio::Registry;

use super::{Guest, Happened, MemoryError, Ready, Tokens, Vectors};
use crate::{Wake, clock};

const PAGE: usize = PAGE_SIZE as usize;
const WORDS: usize = PAGE / 8;
/// Room for a device state.
const STATE_MOST: usize = 1 << 20;
const STATE_LEN: u64 = 64;
const STATE_MAGIC: u64 = 0x6574_6174_735f_6b66;
/// The slot that all its memory is in.
pub const SLOT: Slot = Slot(0);

/// Where the fake writes the number that it says next ([`FakeHandle::work`]).
pub const WRITTEN: (Slot, u64) = (SLOT, 64);
/// Where the fake counts the client frames that it has answered.
pub const HEARD: (Slot, u64) = (SLOT, 72);
/// The experimental ethertype of frames that say a number.
const NUMBER: [u8; 2] = [0x88, 0xb5];

/// What a guest's side can get wrong, seeded into the fake. Each is found by the verdict of the
/// conformance kit that is named here; most of them a failover test passes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// A dirty page is neither reported nor staged: `pages`.
    MissesPage,
    /// A page that was written after it was copied is not copied again: `pages`.
    CopiesEarly,
    /// Pages that were asked for besides the dirty ones are not staged: `also`.
    ForgetsAlso,
    /// RAM is written while the guest is paused: `still memory`.
    WritesWhilePaused,
    /// Frames are said while the guest is paused: `still frames`.
    SpeaksWhilePaused,
    /// Frames after a capture carry the epoch before it: `stamps`.
    StampsLate,
    /// A frame is reported before the capture it follows: `order`.
    ReportsEarly,
    /// The cut counts frames that are queued and not consumed: `cut`.
    CutsTooHigh,
    /// A damaged state passes its check: `damage`.
    AcceptsDamage,
    /// Device state is not loaded: `load`.
    KeepsState,
    /// A permit is not looked at: `permit`.
    IgnoresPermit,
}

impl Fault {
    /// All of them, with the verdict that finds each.
    pub const ALL: [(Self, &str); 11] = [
        (Self::MissesPage, "pages"),
        (Self::CopiesEarly, "pages"),
        (Self::ForgetsAlso, "also"),
        (Self::WritesWhilePaused, "still memory"),
        (Self::SpeaksWhilePaused, "still frames"),
        (Self::StampsLate, "stamps"),
        (Self::ReportsEarly, "order"),
        (Self::CutsTooHigh, "cut"),
        (Self::AcceptsDamage, "damage"),
        (Self::KeepsState, "load"),
        (Self::IgnoresPermit, "permit"),
    ];
}

/// The number in a frame that [`FakeHandle::work`] made.
#[must_use]
pub fn number(frame: &[u8]) -> Option<u64> {
    let rest = frame.get(12..)?.strip_prefix(&NUMBER)?;
    rest.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
}

fn numbered(number: u64) -> Bytes {
    let mut frame = BytesMut::zeroed(60);
    let (head, rest) = frame.split_at_mut(14);
    head[12..].copy_from_slice(&NUMBER);
    rest[..8].copy_from_slice(&number.to_le_bytes());
    frame.freeze()
}

/// The guest, as the loop has it.
#[derive(Debug)]
pub struct FakeGuest(FakeHandle);

/// The guest, as the test that made it has it.
#[derive(Clone, Debug)]
pub struct FakeHandle {
    all: Arc<All>,
}

#[derive(Debug)]
struct All {
    ram: Memory,
    cache: Memory,
    staging: Memory,
    state_out: Memory,
    state_in: Memory,
    inner: Mutex<View>,
    changed: Condvar,
}

/// What can be seen of a fake guest from outside.
#[derive(Debug)]
pub struct View {
    /// Whether vCPUs would run.
    pub running: bool,
    /// Stamp of the frames it emits now.
    pub epoch: Epoch,
    /// Device state: how many client frames it has answered, as far as its memory knows.
    pub ticks: u64,
    /// Index of the last client frame consumed.
    pub consumed: u64,
    /// Frames that left for the world, in order.
    pub world: Vec<Bytes>,
    /// Frames whose permit had ended.
    pub muted: u64,
    /// How often its address was announced.
    pub announced: u64,
    /// Operations begun, in order.
    pub ops: Vec<GuestOpKind>,
    /// Operations that wait for [`FakeHandle::finish`].
    pub waiting: VecDeque<GuestOp>,
    /// Whether operations wait for [`FakeHandle::finish`].
    pub by_hand: bool,
    /// The next operation of this kind fails.
    pub fail: Option<GuestOpKind>,
    /// What it gets wrong.
    pub fault: Option<Fault>,
    /// Bytes of state that were received.
    received: u64,
    card: VecDeque<(u64, Bytes)>,
    dirty: Vec<u64>,
    happened: VecDeque<Happened>,
    wake: Option<Wake>,
}

/// Memory that the kernel and several threads may write at once: never a slice of bytes.
#[derive(Debug)]
struct Memory(Box<[AtomicU64]>);

impl Memory {
    fn new(bytes: usize) -> Self {
        let words: Box<[AtomicU64]> = (0..bytes / 8).map(|_| AtomicU64::new(0)).collect();
        // Touched now, so that no measurement pays for the kernel's first page of zeros.
        words
            .iter()
            .step_by(WORDS)
            .for_each(|word| word.store(0, Relaxed));
        Self(words)
    }

    fn range(&self, bytes: Range<usize>, into: &mut Vectors) -> Result<(), MemoryError> {
        if bytes.start > bytes.end || bytes.end > self.0.len() * 8 {
            return Err(MemoryError {
                what: format!("{bytes:?}"),
                why: "beyond the end",
            });
        }
        let start = self.0.as_ptr().cast::<u8>().cast_mut();
        // SAFETY: within the allocation, which lives as long as the guest and consists of
        // atomics.
        unsafe { into.push(start.wrapping_add(bytes.start), bytes.len()) };
        Ok(())
    }

    fn runs(&self, runs: &PageRuns, into: &mut Vectors) -> Result<(), MemoryError> {
        for run in runs {
            if run.slot != SLOT {
                return Err(MemoryError {
                    what: format!("{run:?}"),
                    why: "there is one slot, number 0",
                });
            }
            let at = |page| {
                usize::try_from(page)
                    .unwrap_or(usize::MAX)
                    .saturating_mul(PAGE)
            };
            self.range(at(run.first)..at(run.end()), into)?;
        }
        Ok(())
    }

    fn copy_page(&self, to: &Self, page: usize) {
        let range = page * WORDS..(page + 1) * WORDS;
        for (from, to) in self.0[range.clone()].iter().zip(&to.0[range]) {
            to.store(from.load(Relaxed), Relaxed);
        }
    }

    fn word(&self, at: usize) -> u64 {
        self.0[at].load(Relaxed)
    }
}

impl FakeGuest {
    /// A running guest with `pages` pages, all of them dirty, as after a boot.
    #[must_use]
    pub fn new(pages: usize) -> (Self, FakeHandle) {
        Self::make(pages, true)
    }

    /// A guest that waits for a state.
    #[must_use]
    pub fn empty(pages: usize) -> (Self, FakeHandle) {
        Self::make(pages, false)
    }

    fn make(pages: usize, running: bool) -> (Self, FakeHandle) {
        let mut dirty = vec![0; pages.div_ceil(64)];
        if running {
            (0..pages).for_each(|page| dirty[page / 64] |= 1 << (page % 64));
        }
        let handle = FakeHandle {
            all: Arc::new(All {
                ram: Memory::new(pages * PAGE),
                cache: Memory::new(pages * PAGE),
                staging: Memory::new(pages * PAGE),
                state_out: Memory::new(STATE_MOST),
                state_in: Memory::new(STATE_MOST),
                inner: Mutex::new(View {
                    running,
                    epoch: Epoch(0),
                    ticks: 0,
                    consumed: 0,
                    world: Vec::new(),
                    muted: 0,
                    announced: 0,
                    ops: Vec::new(),
                    waiting: VecDeque::new(),
                    by_hand: false,
                    fail: None,
                    fault: None,
                    received: 0,
                    card: VecDeque::new(),
                    dirty,
                    happened: VecDeque::new(),
                    wake: None,
                }),
                changed: Condvar::new(),
            }),
        };
        (Self(handle.clone()), handle)
    }
}

impl FakeHandle {
    fn lock(&self) -> MutexGuard<'_, View> {
        self.all
            .inner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the guest.
    pub fn view<T>(&self, look: impl FnOnce(&View) -> T) -> T {
        look(&self.lock())
    }

    /// Changes how the guest behaves.
    pub fn adjust(&self, change: impl FnOnce(&mut View)) {
        change(&mut self.lock());
        self.all.changed.notify_all();
    }

    /// Waits until something is true of the guest; `false` if it does not become true in time.
    pub fn wait(&self, patience: Duration, is: impl Fn(&View) -> bool) -> bool {
        let until = time::Instant::now() + patience;
        let mut view = self.lock();
        while !is(&view) {
            let left = until.saturating_duration_since(time::Instant::now());
            if left.is_zero() {
                return false;
            }
            view = self
                .all
                .changed
                .wait_timeout(view, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    /// Writes the first word of a page as the guest would; `false` when it is paused.
    pub fn write(&self, page: usize, value: u64) -> bool {
        let mut view = self.lock();
        if view.running {
            self.store(&mut view, page, value);
        }
        view.running
    }

    /// The first word of a page.
    #[must_use]
    pub fn page(&self, page: usize) -> u64 {
        self.all.ram.word(page * WORDS)
    }

    /// Whether all RAM equals another guest's.
    #[must_use]
    pub fn same_ram(&self, other: &Self) -> bool {
        let (a, b) = (&self.all.ram.0, &other.all.ram.0);
        a.len() == b.len()
            && a.iter()
                .zip(b)
                .all(|(a, b)| a.load(Relaxed) == b.load(Relaxed))
    }

    /// Writes the next number, a page besides, and says the number, as a guest that works does;
    /// `false` when it is paused.
    pub fn work(&self) -> bool {
        let mut view = self.lock();
        if view.running {
            self.work_on(&mut view);
            return true;
        }
        let (ticks, epoch) = (view.ticks, view.epoch);
        match view.fault {
            Some(Fault::WritesWhilePaused) => self.store(&mut view, 2, ticks ^ u64::MAX),
            Some(Fault::SpeaksWhilePaused) => view.happen(Happened::FromGuest {
                epoch,
                frame: numbered(ticks),
            }),
            _ => {}
        }
        false
    }

    fn work_on(&self, view: &mut View) {
        view.ticks += 1;
        let (ticks, pages) = (view.ticks, self.pages() as u64);
        self.word(view, WRITTEN.1, ticks);
        if pages > 4 {
            let page = 2 + ticks % (pages - 3);
            self.store(view, usize::try_from(page).unwrap_or(0), ticks);
        }
        let epoch = match view.fault {
            Some(Fault::StampsLate) => Epoch(view.epoch.0.saturating_sub(1)),
            _ => view.epoch,
        };
        view.happen(Happened::FromGuest {
            epoch,
            frame: numbered(ticks),
        });
    }

    /// Writes a word of page 0.
    fn word(&self, view: &mut View, at: u64, value: u64) {
        self.all.ram.0[usize::try_from(at / 8).unwrap_or(0)].store(value, Relaxed);
        view.dirty[0] |= 1;
    }

    /// Emits a frame as the guest would; `false` when it is paused.
    pub fn emit(&self, frame: Bytes) -> bool {
        let mut view = self.lock();
        if !view.running {
            return false;
        }
        let epoch = view.epoch;
        view.happen(Happened::FromGuest { epoch, frame });
        true
    }

    /// A client's frame arrives from outside.
    pub fn from_world(&self, frame: Bytes) {
        self.lock().happen(Happened::FromWorld(frame));
    }

    /// Anything happens.
    pub fn happen(&self, what: Happened) {
        self.lock().happen(what);
    }

    /// Finishes the oldest waiting operation; `false` when there is none.
    pub fn finish(&self) -> bool {
        let mut view = self.lock();
        let Some(op) = view.waiting.pop_front() else {
            return false;
        };
        self.run(&mut view, op);
        true
    }

    fn store(&self, view: &mut View, page: usize, value: u64) {
        self.all.ram.0[page * WORDS].store(value, Relaxed);
        view.dirty[page / 64] |= 1 << (page % 64);
    }

    fn pages(&self) -> usize {
        self.all.ram.0.len() / WORDS
    }

    /// Answers client frames: each makes a page dirty and a frame go back to its sender.
    fn answer(&self, view: &mut View) {
        while view.running
            && let Some((index, frame)) = view.card.pop_front()
        {
            view.consumed = index;
            view.ticks += 1;
            let heard = self.all.ram.word(usize::try_from(HEARD.1 / 8).unwrap_or(0)) + 1;
            self.word(view, HEARD.1, heard);
            self.word(view, WRITTEN.1, view.ticks);
            let (ticks, pages) = (view.ticks, self.pages() as u64);
            self.store(view, usize::try_from(ticks % pages).unwrap_or(0), ticks);
            let mut reply = BytesMut::from(&frame[..]);
            if let Some((to, from)) = reply.get_mut(..12).and_then(|m| m.split_at_mut_checked(6)) {
                to.swap_with_slice(from);
            }
            let epoch = view.epoch;
            view.happen(Happened::FromGuest {
                epoch,
                frame: reply.freeze(),
            });
        }
    }

    fn run(&self, view: &mut View, op: GuestOp) {
        let kind = op.kind();
        if view.fail.take_if(|fail| *fail == kind).is_some() {
            view.happen(Happened::Done(GuestDone::Failed {
                op: kind,
                why: "told to fail".to_owned(),
            }));
            return;
        }
        let done = match op {
            GuestOp::Pause => {
                view.running = false;
                GuestDone::Paused
            }
            GuestOp::Resume => {
                view.running = true;
                self.answer(view);
                GuestDone::Resumed
            }
            GuestOp::Harvest => {
                view.report_dirty();
                GuestDone::Harvested
            }
            GuestOp::Capture {
                epoch,
                also,
                resume,
            } => GuestDone::Captured(self.capture(view, epoch, &also, resume)),
            GuestOp::CheckState(epoch) => {
                let whole = view.received >= STATE_LEN && self.all.state_in.word(0) == STATE_MAGIC;
                if whole || view.fault == Some(Fault::AcceptsDamage) {
                    GuestDone::StateChecked(epoch)
                } else {
                    GuestDone::Failed {
                        op: kind,
                        why: "not a state".to_owned(),
                    }
                }
            }
            GuestOp::CommitRam { epoch, runs } => {
                each_page(&runs, |page| {
                    self.all.cache.copy_page(&self.all.ram, page);
                    view.dirty[page / 64] &= !(1 << (page % 64));
                });
                GuestDone::RamCommitted(epoch)
            }
            GuestOp::Replication(op) => GuestDone::Replication(op),
            GuestOp::LoadState { epoch, inputs } => {
                if view.fault != Some(Fault::KeepsState) {
                    view.ticks = self.all.state_in.word(1);
                }
                view.consumed = inputs;
                view.epoch = epoch;
                view.card.clear();
                GuestDone::StateLoaded(epoch)
            }
            other => GuestDone::Failed {
                op: kind,
                why: format!("{other:?} is not known here"),
            },
        };
        view.happen(Happened::Done(done));
        self.all.changed.notify_all();
    }

    fn capture(&self, view: &mut View, epoch: Epoch, also: &PageRuns, resume: bool) -> Captured {
        let begun = time::Instant::now();
        let fault = view.fault;
        if fault == Some(Fault::MissesPage)
            && let Some(word) = view.dirty.iter_mut().rev().find(|word| **word != 0)
        {
            *word &= !(1 << (63 - word.leading_zeros()));
        }
        for page in 0..self.pages() {
            if view.dirty[page / 64] & (1 << (page % 64)) != 0 {
                self.all.ram.copy_page(&self.all.staging, page);
            }
        }
        if fault != Some(Fault::ForgetsAlso) {
            each_page(also, |page| self.all.ram.copy_page(&self.all.staging, page));
        }
        if fault == Some(Fault::CopiesEarly) && view.running {
            self.work_on(view);
        }
        self.all.state_out.0[0].store(STATE_MAGIC, Relaxed);
        self.all.state_out.0[1].store(view.ticks, Relaxed);
        view.report_dirty();
        view.epoch = epoch;
        view.running = resume;
        if fault == Some(Fault::ReportsEarly) {
            let frame = numbered(view.ticks);
            view.happen(Happened::FromGuest { epoch, frame });
        }
        let newest = view.card.back().map_or(view.consumed, |(index, _)| *index);
        let inputs = match fault {
            Some(Fault::CutsTooHigh) => newest,
            _ => view.consumed,
        };
        Captured {
            epoch,
            state_len: STATE_LEN,
            inputs,
            pause: begun.elapsed(),
            live: Duration::ZERO,
        }
    }
}

impl View {
    fn happen(&mut self, what: Happened) {
        self.happened.push_back(what);
        if let Some(wake) = &self.wake {
            wake.wake();
        }
    }

    fn report_dirty(&mut self) {
        let clean = vec![0; self.dirty.len()];
        let words = std::mem::replace(&mut self.dirty, clean);
        self.happen(Happened::Dirty(SLOT, words));
    }
}

impl Guest for FakeGuest {
    fn attach(&mut self, _registry: &Registry, _tokens: Tokens, wake: Wake) -> io::Result<()> {
        self.0.lock().wake = Some(wake);
        Ok(())
    }

    fn ready(&mut self, _index: usize, _ready: Ready) {}

    fn start(&mut self, op: GuestOp) {
        let mut view = self.0.lock();
        view.ops.push(op.kind());
        if view.by_hand {
            view.waiting.push_back(op);
        } else {
            self.0.run(&mut view, op);
        }
        self.0.all.changed.notify_all();
    }

    fn poll(&mut self) -> Option<Happened> {
        self.0.lock().happened.pop_front()
    }

    fn to_guest(&mut self, index: u64, frame: Bytes) {
        let mut view = self.0.lock();
        view.card.push_back((index, frame));
        self.0.answer(&mut view);
    }

    fn to_world(&mut self, frame: Bytes, permit: Permit) {
        let mut view = self.0.lock();
        if permit.allows(clock::now()) || view.fault == Some(Fault::IgnoresPermit) {
            view.world.push(frame);
        } else {
            view.muted += 1;
        }
        self.0.all.changed.notify_all();
    }

    fn announce(&mut self) {
        self.0.lock().announced += 1;
        self.0.all.changed.notify_all();
    }

    fn source(&mut self, body: &Body, into: &mut Vectors) -> Result<(), MemoryError> {
        let all = &self.0.all;
        match body {
            Body::Live(runs) => all.ram.runs(runs, into),
            Body::Staged(runs) => all.staging.runs(runs, into),
            Body::State(range) => all.state_out.range(as_usize(range), into),
            other => Err(MemoryError {
                what: format!("{other:?}"),
                why: "not the guest's memory",
            }),
        }
    }

    fn sink(&mut self, sink: &Sink, into: &mut Vectors) -> Result<(), MemoryError> {
        let all = &self.0.all;
        match sink {
            Sink::Guest(runs) => all.ram.runs(runs, into),
            Sink::Cache(runs) => all.cache.runs(runs, into),
            Sink::State(range) => {
                self.0.lock().received = range.end;
                all.state_in.range(as_usize(range), into)
            }
            other => Err(MemoryError {
                what: format!("{other:?}"),
                why: "no such place here",
            }),
        }
    }
}

/// All pages from `first` on, as one run; nothing if there are none.
#[must_use]
pub fn run(first: u64, pages: u32) -> PageRuns {
    let mut runs = PageRuns::new();
    if let Some(pages) = NonZeroU32::new(pages) {
        // The first run of a list always fits.
        let _fits = runs.push(PageRun {
            slot: SLOT,
            first,
            pages,
        });
    }
    runs
}

fn each_page(runs: &PageRuns, mut visit: impl FnMut(usize)) {
    for run in runs {
        (run.first..run.end()).for_each(|page| visit(usize::try_from(page).unwrap_or(usize::MAX)));
    }
}

fn as_usize(range: &Range<u64>) -> Range<usize> {
    let end = |at| usize::try_from(at).unwrap_or(usize::MAX);
    end(range.start)..end(range.end)
}
