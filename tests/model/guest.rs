//! A guest of two pages whose state is its history: a bit for each client frame that it consumed,
//! behind a leading one. The bit says how the guest went on; nothing outside decides it.

use std::collections::VecDeque;

use bytes::Bytes;
use colo_proto::{
    id::{Epoch, PageRuns, Slot},
    machine::{Body, Captured, GuestDone, GuestOp, Sink},
    testing::Guest,
};

pub(crate) const PAGES: usize = 2;

/// A guest's past.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct History(pub(crate) u16);

impl History {
    pub(crate) const START: Self = Self(1);

    fn then(self, bit: u16) -> Self {
        Self(self.0 << 1 | bit)
    }

    /// Whether `self` is how `later` began.
    pub(crate) const fn led_to(self, later: Self) -> bool {
        let more = self
            .0
            .leading_zeros()
            .saturating_sub(later.0.leading_zeros());
        later.0 >> more == self.0
    }
}

/// What a capture holds. RAM is in it only to be compared at the load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Snapshot {
    history: History,
    ram: [u16; PAGES],
}

/// What travels.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Contents {
    Pages(Vec<u16>),
    State(Snapshot),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Vm {
    ram: [u16; PAGES],
    staging: [u16; PAGES],
    cache: [u16; PAGES],
    dirty: u64,
    pub(crate) history: History,
    consumed: u64,
    epoch: Epoch,
    pub(crate) running: bool,
    card: VecDeque<u64>,
    said: VecDeque<(Epoch, History)>,
    captured: Snapshot,
    arrived: Snapshot,
    /// RAM and devices are of one moment.
    whole: bool,
    /// Newest epoch loaded.
    pub(crate) loaded: Epoch,
    /// The law that was broken here.
    pub(crate) broken: Option<&'static str>,
}

impl Vm {
    /// A guest that has booted, or the empty shell of one.
    pub(crate) fn new(whole: bool) -> Self {
        let start = Snapshot {
            history: History::START,
            ram: [0; PAGES],
        };
        Self {
            ram: start.ram,
            staging: start.ram,
            cache: start.ram,
            dirty: 0,
            history: start.history,
            consumed: 0,
            epoch: Epoch(0),
            running: false,
            card: VecDeque::new(),
            said: VecDeque::new(),
            captured: start,
            arrived: start,
            whole,
            loaded: Epoch(0),
            broken: None,
        }
    }

    /// Whether a client frame waits for a guest that runs.
    pub(crate) fn can_step(&self) -> bool {
        self.running && !self.card.is_empty()
    }

    /// Whether something was said that nobody took from the card yet.
    pub(crate) fn has_said(&self) -> bool {
        !self.said.is_empty()
    }

    /// Consumes a client frame and answers with the history that includes it.
    pub(crate) fn step(&mut self, bit: u16) {
        if let Some(index) = self.card.pop_front().filter(|_| self.running) {
            self.history = self.history.then(bit);
            self.consumed = index;
            let page = usize::from(self.history.0.leading_zeros() % 2 == 1);
            self.ram[page] = self.history.0;
            self.dirty |= 1 << page;
            self.said.push_back((self.epoch, self.history));
        }
    }

    fn must(&mut self, holds: bool, law: &'static str) {
        if !holds {
            self.broken = Some(law);
        }
    }
}

impl Guest for Vm {
    type Contents = Contents;

    fn operate(&mut self, op: GuestOp) -> GuestDone {
        match &op {
            GuestOp::Pause => self.running = false,
            GuestOp::Resume => {
                self.must(self.whole, "a mixture of two epochs runs");
                self.running = true;
            }
            GuestOp::Capture {
                epoch,
                also,
                resume,
            } => {
                // What is neither dirty nor asked for is not kept; sending it would show.
                self.staging = [u16::MAX; PAGES];
                let dirty = (0..PAGES).filter(|page| self.dirty >> page & 1 == 1);
                for page in dirty.chain(pages(also)) {
                    self.staging[page] = self.ram[page];
                }
                self.captured = Snapshot {
                    history: self.history,
                    ram: self.ram,
                };
                (self.epoch, self.running) = (*epoch, *resume);
                return GuestDone::Captured(Captured {
                    inputs: self.consumed,
                    ..Captured::new(*epoch, 8)
                });
            }
            GuestOp::CommitRam { runs, .. } => {
                self.must(!self.running, "RAM is committed under a running guest");
                for page in pages(runs) {
                    self.ram[page] = self.cache[page];
                    self.dirty &= !(1 << page);
                }
                self.whole = false;
            }
            GuestOp::LoadState { epoch, inputs } => {
                self.must(
                    self.ram == self.arrived.ram,
                    "RAM after a commit is not what was captured",
                );
                self.history = self.arrived.history;
                (self.consumed, self.epoch, self.loaded) = (*inputs, *epoch, *epoch);
                self.whole = true;
                self.card.clear();
                self.said.clear();
            }
            _ => {}
        }
        op.done()
    }

    fn dirty(&mut self) -> Vec<(Slot, Vec<u64>)> {
        vec![(Slot(0), vec![std::mem::take(&mut self.dirty)])]
    }

    fn read(&mut self, body: &Body) -> Contents {
        let (runs, from) = match body {
            Body::Live(runs) => (runs, &self.ram),
            Body::Staged(runs) => (runs, &self.staging),
            _ => return Contents::State(self.captured),
        };
        Contents::Pages(pages(runs).map(|page| from[page]).collect())
    }

    fn write(&mut self, sink: &Sink, contents: Contents) {
        let (runs, into) = match (sink, &contents) {
            (Sink::Guest(runs), Contents::Pages(_)) => {
                self.whole = false;
                (runs, &mut self.ram)
            }
            (Sink::Cache(runs), Contents::Pages(_)) => (runs, &mut self.cache),
            (_, Contents::State(state)) => {
                self.arrived = *state;
                return;
            }
            (sink, _) => panic!("pages arrive for {sink:?}"),
        };
        let Contents::Pages(words) = contents else {
            return;
        };
        for (page, word) in pages(runs).zip(words) {
            into[page] = word;
        }
    }

    fn hear(&mut self, index: u64, _: Bytes) {
        self.card.push_back(index);
    }

    fn say(&mut self) -> Option<(Epoch, Bytes)> {
        let (epoch, history) = self.said.pop_front()?;
        Some((epoch, Bytes::copy_from_slice(&history.0.to_be_bytes())))
    }
}

fn pages(runs: &PageRuns) -> impl Iterator<Item = usize> {
    runs.iter()
        .flat_map(|run| usize::try_from(run.first).unwrap()..usize::try_from(run.end()).unwrap())
}
