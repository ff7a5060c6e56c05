//! A guest on a loop of its own, with a shadow of its memory.

use std::{
    collections::BTreeMap,
    num::NonZeroU32,
    time::{Duration, Instant},
};

use bytes::Bytes;
use colo_proto::{
    id::{Epoch, Generation, PAGE_SIZE, PageRun, PageRuns, Slot},
    machine::{Body, Captured, GuestDone, GuestOp, GuestOpKind, Sink},
    member::Permit,
    ram::PageSet,
};
use mio::{Events, Poll, Token};

use super::Subject;
use crate::{
    Guest, Wake, clock,
    guest::{Happened, Ready, Tokens, Vectors},
};

/// How long an operation may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a call may take that must not wait: hundreds of times what it needs.
const AT_ONCE: Duration = Duration::from_millis(500);
/// Pages copied by one call.
const CHUNK: u64 = 1024;

/// All memory of a guest, and the rest of it.
#[derive(Clone, Debug)]
pub(super) struct Image {
    pub(super) ram: BTreeMap<Slot, Vec<u8>>,
    pub(super) state: Vec<u8>,
    pub(super) inputs: u64,
}

pub(super) struct Kit<G> {
    guest: G,
    poll: Poll,
    pub(super) subject: Subject,
    /// What the last operation reported as dirty.
    pub(super) dirty: PageSet,
    /// Client frames brought so far.
    pub(super) index: u64,
    /// Newest epoch that was told.
    pub(super) told: Epoch,
    /// Numbers that were said, with their stamps.
    pub(super) said: Vec<(Epoch, u64)>,
    /// Frames of any kind that were reported.
    pub(super) frames: u64,
    /// The first frame that came before its capture.
    pub(super) early: Option<String>,
    /// The first call that waited.
    pub(super) slow: Option<String>,
    /// RAM as the captures have it.
    pub(super) shadow: BTreeMap<Slot, Vec<u8>>,
    last: Epoch,
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl<G: Guest> Kit<G> {
    pub(super) fn new(guest: G, subject: Subject) -> Result<Self, String> {
        let poll = Poll::new().map_err(text)?;
        let wake = Wake::new(poll.registry(), Token(1)).map_err(text)?;
        let shadow = subject
            .slots
            .iter()
            .map(|&(slot, pages)| (slot, vec![0; (pages * PAGE_SIZE) as usize]))
            .collect();
        let mut kit = Self {
            guest,
            poll,
            dirty: PageSet::new(&subject.slots),
            subject,
            index: 0,
            told: Epoch(0),
            said: Vec::new(),
            frames: 0,
            early: None,
            slow: None,
            shadow,
            last: Epoch(0),
        };
        let registry = kit.poll.registry();
        kit.guest
            .attach(registry, Tokens::GUEST, wake)
            .map_err(text)?;
        Ok(kit)
    }

    fn timed<T>(&mut self, what: &str, call: impl FnOnce(&mut G) -> T) -> T {
        let begun = Instant::now();
        let result = call(&mut self.guest);
        let took = begun.elapsed();
        if took > AT_ONCE && self.slow.is_none() {
            self.slow = Some(format!("{what} took {took:?}"));
        }
        result
    }

    /// Moves frames until an operation is done, or for a while.
    pub(super) fn pump(&mut self, patience: Duration) -> Result<Option<GuestDone>, String> {
        let until = Instant::now() + patience;
        let mut events = Events::with_capacity(16);
        loop {
            while let Some(happened) = self.timed("poll", |guest| guest.poll()) {
                match happened {
                    Happened::Dirty(slot, words) if self.dirty.merge(slot, &words) => {}
                    Happened::Dirty(slot, _) => {
                        return Err(format!("dirty pages of {slot:?}, which there is not"));
                    }
                    Happened::Done(done) => {
                        match &done {
                            GuestDone::Captured(captured) => self.told = captured.epoch,
                            GuestDone::StateLoaded(epoch) => self.told = *epoch,
                            _ => {}
                        }
                        return Ok(Some(done));
                    }
                    Happened::FromGuest { epoch, frame } => {
                        self.frames += 1;
                        if epoch > self.told && self.early.is_none() {
                            self.early = Some(format!(
                                "a frame of epoch {epoch} before its capture; {} was told",
                                self.told
                            ));
                        }
                        if let Some(number) = (self.subject.said)(&frame) {
                            self.said.push((epoch, number));
                        }
                        self.lets_out(frame, colo_proto::time::Instant::END);
                    }
                    Happened::FromWorld(frame) => self.bring(frame),
                    _ => {}
                }
                if Instant::now() > until {
                    return Ok(None);
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.poll.poll(&mut events, Some(left)).map_err(text)?;
            for event in &events {
                if let Some(index) = Tokens::GUEST.index(event.token()) {
                    let ready = Ready {
                        readable: true,
                        writable: true,
                    };
                    self.guest.ready(index, ready);
                }
            }
        }
    }

    pub(super) fn lets_out(&mut self, frame: Bytes, until: colo_proto::time::Instant) {
        let permit = Permit {
            generation: Generation(1),
            until,
        };
        self.timed("to_world", |guest| guest.to_world(frame, permit));
    }

    /// A permit that has just ended.
    pub(super) fn ended() -> colo_proto::time::Instant {
        let ended = clock::now();
        std::thread::sleep(Duration::from_millis(1));
        ended
    }

    pub(super) fn bring(&mut self, frame: Bytes) {
        self.index += 1;
        let index = self.index;
        self.timed("to_guest", |guest| guest.to_guest(index, frame));
    }

    pub(super) fn call(&mut self) {
        let frame = (self.subject.call)();
        self.bring(frame);
    }

    /// Carries an operation out; its answer, which may be that it failed.
    pub(super) fn operate(&mut self, op: GuestOp) -> Result<GuestDone, String> {
        let kind = op.kind();
        self.dirty.clear();
        self.timed("start", |guest| guest.start(op));
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            if let Some(done) = self.pump(until.saturating_duration_since(Instant::now()))? {
                return Ok(done);
            }
        }
        Err(format!("{kind:?} does not end"))
    }

    /// The same, and it must succeed.
    pub(super) fn succeed(&mut self, op: GuestOp) -> Result<(), String> {
        let expected = op.done();
        let done = self.operate(op)?;
        if done == expected {
            return Ok(());
        }
        Err(format!("expected {expected:?}, got {done:?}"))
    }

    pub(super) fn capture(
        &mut self,
        also: &PageRuns,
        resume: bool,
    ) -> Result<(Captured, PageSet), String> {
        self.last = self.last.next();
        let epoch = self.last;
        let op = GuestOp::Capture {
            epoch,
            also: also.clone(),
            resume,
        };
        let done = self.operate(op)?;
        let GuestDone::Captured(captured) = done else {
            return Err(format!("a capture ended with {done:?}"));
        };
        if captured.epoch != epoch {
            return Err(format!("epoch {epoch} was asked for: {captured:?}"));
        }
        if captured.inputs > self.index {
            return Err(format!("{captured:?}, {} frames were brought", self.index));
        }
        let mut pages = self.dirty.clone();
        for run in also {
            pages.insert(*run);
        }
        Ok((captured, pages))
    }

    /// A failed capture uses its number up.
    pub(super) fn next_epoch(&mut self) -> Epoch {
        self.last = self.last.next();
        self.last
    }

    /// Copies the staged pages of a capture into the shadow; how many.
    pub(super) fn take_staged(&mut self, pages: &PageSet) -> Result<u64, String> {
        let count = pages.count();
        for part in chunks(pages) {
            let mut bytes = vec![0; part.bytes() as usize];
            self.copy(&Body::Staged(part.clone()), &mut bytes)?;
            let mut rest = &bytes[..];
            for run in &part {
                let (now, later) = rest.split_at(run.bytes() as usize);
                let at = (run.first * PAGE_SIZE) as usize;
                if let Some(slot) = self.shadow.get_mut(&run.slot) {
                    slot[at..at + now.len()].copy_from_slice(now);
                }
                rest = later;
            }
        }
        Ok(count)
    }

    /// All memory as it is now.
    pub(super) fn live(&mut self) -> Result<BTreeMap<Slot, Vec<u8>>, String> {
        let mut all = PageSet::new(&self.subject.slots);
        all.fill();
        let mut ram: BTreeMap<Slot, Vec<u8>> = BTreeMap::new();
        for part in chunks(&all) {
            let mut bytes = vec![0; part.bytes() as usize];
            self.copy(&Body::Live(part.clone()), &mut bytes)?;
            let mut rest = &bytes[..];
            for run in &part {
                let (now, later) = rest.split_at(run.bytes() as usize);
                ram.entry(run.slot).or_default().extend(now);
                rest = later;
            }
        }
        Ok(ram)
    }

    pub(super) fn vectors(&mut self, body: &Body) -> Result<Vectors, String> {
        let mut pieces = Vectors::default();
        self.timed("source", |guest| guest.source(body, &mut pieces))
            .map_err(text)?;
        Ok(pieces)
    }

    pub(super) fn places(&mut self, sink: &Sink) -> Result<Vectors, String> {
        let mut pieces = Vectors::default();
        self.timed("sink", |guest| guest.sink(sink, &mut pieces))
            .map_err(text)?;
        Ok(pieces)
    }

    pub(super) fn copy(&mut self, body: &Body, to: &mut [u8]) -> Result<(), String> {
        let pieces = self.vectors(body)?;
        let mut rest = to;
        for (at, len) in pieces.pieces() {
            let (now, later) = rest
                .split_at_mut_checked(len)
                .ok_or("a source is longer than was asked for")?;
            // SAFETY: the guest vouches for its pieces, and `now` is as long.
            unsafe { at.copy_to(now.as_mut_ptr(), len) };
            rest = later;
        }
        if rest.is_empty() {
            Ok(())
        } else {
            Err("a source is shorter than was asked for".into())
        }
    }

    /// Puts bytes where a peer's would go.
    pub(super) fn receive(&mut self, sink: &Sink, from: &[u8]) -> Result<(), String> {
        let pieces = self.places(sink)?;
        let mut rest = from;
        for (at, len) in pieces.pieces() {
            let (now, later) = rest
                .split_at_checked(len)
                .ok_or("a sink is longer than was asked for")?;
            // SAFETY: the guest vouches for its pieces, and `now` is as long.
            unsafe { at.copy_from(now.as_ptr(), len) };
            rest = later;
        }
        if rest.is_empty() {
            Ok(())
        } else {
            Err("a sink is shorter than was asked for".into())
        }
    }

    /// The state of the last capture.
    pub(super) fn state(&mut self, captured: &Captured) -> Result<Vec<u8>, String> {
        let mut state = vec![0; captured.state_len as usize];
        self.copy(&Body::State(0..captured.state_len), &mut state)?;
        Ok(state)
    }

    /// Loads an image as a secondary does, over whatever is there; the guest is paused then.
    pub(super) fn load(&mut self, image: &Image, epoch: Epoch) -> Result<(), String> {
        let mut all = PageSet::new(&self.subject.slots);
        all.fill();
        for part in chunks(&all) {
            let mut bytes = Vec::with_capacity(part.bytes() as usize);
            for run in &part {
                let at = (run.first * PAGE_SIZE) as usize;
                let slot = image.ram.get(&run.slot).ok_or("a slot is gone")?;
                bytes.extend(&slot[at..at + run.bytes() as usize]);
            }
            self.receive(&Sink::Cache(part), &bytes)?;
        }
        self.receive(&Sink::State(0..image.state.len() as u64), &image.state)?;
        self.succeed(GuestOp::CheckState(epoch))?;
        self.succeed(GuestOp::Pause)?;
        let runs = all.clone().take_runs(u32::MAX, usize::MAX);
        self.succeed(GuestOp::CommitRam { epoch, runs })?;
        let inputs = image.inputs;
        self.succeed(GuestOp::LoadState { epoch, inputs })?;
        self.index = inputs;
        Ok(())
    }

    pub(super) fn number(&self, ram: &BTreeMap<Slot, Vec<u8>>, at: (Slot, u64)) -> u64 {
        let start = usize::try_from(at.1).unwrap_or(usize::MAX);
        ram.get(&at.0)
            .and_then(|slot| slot.get(start..)?.first_chunk())
            .map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    pub(super) fn written(&self) -> u64 {
        self.number(&self.shadow, self.subject.written)
    }
}

/// Pages that differ, a few of them.
pub(super) fn differ(a: &BTreeMap<Slot, Vec<u8>>, b: &BTreeMap<Slot, Vec<u8>>) -> Option<String> {
    let mut pages = Vec::new();
    for (slot, a) in a {
        let b = b.get(slot).map_or(&[][..], |b| b);
        let both = a
            .chunks(PAGE_SIZE as usize)
            .zip(b.chunks(PAGE_SIZE as usize));
        for (page, (a, b)) in both.enumerate() {
            if a != b {
                pages.push(format!("{}:{page:#x}", slot.0));
            }
        }
    }
    let few = pages.iter().take(8).cloned().collect::<Vec<_>>().join(" ");
    (!pages.is_empty()).then(|| format!("{} pages ({few})", pages.len()))
}

/// The pages of a set in lists of a size that the loop would use.
fn chunks(set: &PageSet) -> Vec<PageRuns> {
    let mut rest = set.clone();
    let mut all = Vec::new();
    while !rest.is_empty() {
        let part = rest.take_runs(CHUNK as u32, 64);
        if part.bytes() == 0 {
            break;
        }
        all.push(part);
    }
    all
}

/// One page.
pub(super) fn page(slot: Slot, first: u64) -> PageRuns {
    let mut runs = PageRuns::new();
    let run = PageRun {
        slot,
        first,
        pages: NonZeroU32::MIN,
    };
    // The first run of a list always fits.
    let _fits = runs.push(run);
    runs
}

/// Whether an operation was refused.
pub(super) fn refused(done: &GuestDone, kind: GuestOpKind) -> bool {
    matches!(done, GuestDone::Failed { op, .. } if *op == kind)
}
