//! A guest of sixteen pages that answers each client frame with a hash over all that it has ever
//! consumed, so that every frame names the history that it was said after.

use alloc::{collections::VecDeque, vec, vec::Vec};
use bytes::Bytes;

use crate::{
    id::{Epoch, PageRuns, Slot},
    machine::{Body, Captured, GuestDone, GuestOp, Sink},
    testing::Guest,
};

pub(super) const PAGES: usize = 16;
pub(super) const SLOT: Slot = Slot(0);
/// Page that counts; the others hold histories.
const TICKS: usize = PAGES - 1;

/// What a device state is made of.
#[derive(Clone, Copy, Default)]
pub(super) struct State {
    pub(super) ticks: u64,
    pub(super) history: u64,
    consumed: u64,
    /// Over all of RAM, to find a mixture of two epochs.
    sum: u64,
}

#[derive(Clone)]
pub(super) struct Toy {
    ram: [u64; PAGES],
    staging: [u64; PAGES],
    cache: [u64; PAGES],
    pub(super) dirty: u64,
    pub(super) state: State,
    captured: State,
    arrived: State,
    pub(super) running: bool,
    pub(super) epoch: Epoch,
    /// RAM and devices are of one moment.
    whole: bool,
    /// Nothing was ever put into it: if it runs, it boots.
    blank: bool,
    pub(super) booted: bool,
    /// The next operation fails.
    pub(super) fails: bool,
    /// Nobody keeps the contents right: laws about them are not checked.
    pub(super) lawless: bool,
    /// Makes what it does next differ from the other guest.
    pub(super) salt: u64,
    card: VecDeque<(u64, Bytes)>,
    /// Each step: the history before it, the state after it.
    pub(super) steps: Vec<(u64, State)>,
    said: VecDeque<(Epoch, Bytes)>,
}

/// What travels: a word a page, or a state.
#[derive(Clone)]
pub(super) enum Contents {
    Pages(Vec<u64>),
    State(State),
}

impl Toy {
    pub(super) fn new(owner: bool) -> Self {
        Self {
            ram: [0; PAGES],
            staging: [0; PAGES],
            cache: [0; PAGES],
            dirty: 0,
            state: State {
                history: 1,
                ..State::default()
            },
            captured: State::default(),
            arrived: State::default(),
            running: false,
            epoch: Epoch(0),
            whole: owner,
            blank: !owner,
            booted: false,
            fails: false,
            lawless: false,
            salt: 0,
            card: VecDeque::new(),
            steps: Vec::new(),
            said: VecDeque::new(),
        }
    }

    /// Something of its own that no client sees.
    pub(super) fn scribble(&mut self, page: usize, value: u64) {
        if self.running {
            self.store(page % TICKS, value);
        }
    }

    fn store(&mut self, page: usize, value: u64) {
        self.ram[page] = value;
        self.dirty |= 1 << page;
    }

    /// Consumes the client frames that wait.
    fn answer(&mut self) {
        while let Some((index, frame)) = self.card.pop_front().filter(|_| self.running) {
            let before = self.state.history;
            let said = frame.iter().fold(0, |hash, b| mix(hash, u64::from(*b)));
            let history = mix(mix(before, said), core::mem::take(&mut self.salt));
            let ticks = self.state.ticks + 1;
            self.state = State {
                ticks,
                history,
                consumed: index,
                sum: 0,
            };
            self.store(history as usize % TICKS, history);
            self.store(TICKS, ticks);
            self.steps.push((before, self.state));
            let mut reply = vec![0x88; 14];
            reply.extend(ticks.to_le_bytes());
            reply.extend(history.to_le_bytes());
            self.said.push_back((self.epoch, reply.into()));
        }
    }

    fn sum(&self) -> u64 {
        self.ram.iter().fold(0, |sum, word| mix(sum, *word))
    }
}

impl Guest for Toy {
    type Contents = Contents;

    fn operate(&mut self, op: GuestOp) -> GuestDone {
        if self.blank && op == GuestOp::Resume {
            // It boots, and may fail to run then: a copy of it can run elsewhere.
            let booted = Self {
                card: core::mem::take(&mut self.card),
                booted: true,
                dirty: (1 << PAGES) - 1,
                fails: self.fails,
                lawless: self.lawless,
                ..Self::new(true)
            };
            *self = booted;
        }
        if core::mem::take(&mut self.fails) {
            if matches!(op, GuestOp::CommitRam { .. } | GuestOp::LoadState { .. }) {
                self.whole = false;
            }
            if let GuestOp::Capture { resume, .. } = op {
                self.running = resume;
            }
            let (op, why) = (op.kind(), "told to fail".into());
            return GuestDone::Failed { op, why };
        }
        match &op {
            GuestOp::Pause => self.running = false,
            GuestOp::Resume => {
                assert!(
                    self.whole || self.lawless,
                    "a guest runs that is a mixture of two epochs"
                );
                self.running = true;
            }
            GuestOp::Capture {
                epoch,
                also,
                resume,
            } => {
                // What is neither dirty nor asked for is not kept; sending it would show.
                self.staging = [0xdead; PAGES];
                let dirty = (0..PAGES).filter(|page| self.dirty >> page & 1 == 1);
                for page in dirty.chain(pages(also)) {
                    self.staging[page] = self.ram[page];
                }
                self.captured = State {
                    sum: self.sum(),
                    ..self.state
                };
                (self.epoch, self.running) = (*epoch, *resume);
                return GuestDone::Captured(Captured {
                    inputs: self.state.consumed,
                    ..Captured::new(*epoch, 32)
                });
            }
            GuestOp::CommitRam { runs, .. } => {
                assert!(!self.running, "RAM is committed under a running guest");
                for page in pages(runs) {
                    self.ram[page] = self.cache[page];
                    self.dirty &= !(1 << page);
                }
                (self.whole, self.blank) = (false, false);
            }
            GuestOp::LoadState { epoch, inputs } => {
                let same = self.sum() == self.arrived.sum;
                assert!(same || self.lawless, "RAM is not what was captured");
                self.state = self.arrived;
                (self.state.consumed, self.epoch) = (*inputs, *epoch);
                (self.whole, self.blank) = (true, false);
                self.card.clear();
                self.said.clear();
            }
            _ => {}
        }
        op.done()
    }

    fn dirty(&mut self) -> Vec<(Slot, Vec<u64>)> {
        vec![(SLOT, vec![core::mem::take(&mut self.dirty)])]
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
        match (sink, contents) {
            (Sink::Guest(runs), Contents::Pages(words)) => {
                (self.whole, self.blank) = (false, false);
                pages(runs)
                    .zip(words)
                    .for_each(|(page, word)| self.ram[page] = word);
            }
            (Sink::Cache(runs), Contents::Pages(words)) => {
                pages(runs)
                    .zip(words)
                    .for_each(|(page, word)| self.cache[page] = word);
            }
            (Sink::State(_), Contents::State(state)) => self.arrived = state,
            (sink, _) => panic!("other contents than were sent arrive for {sink:?}"),
        }
    }

    fn hear(&mut self, index: u64, frame: Bytes) {
        self.card.push_back((index, frame));
    }

    fn say(&mut self) -> Option<(Epoch, Bytes)> {
        self.answer();
        self.said.pop_front()
    }
}

fn pages(runs: &PageRuns) -> impl Iterator<Item = usize> {
    runs.iter().flat_map(|run| {
        assert!(
            run.slot == SLOT && run.end() <= PAGES as u64,
            "outside memory"
        );
        run.first as usize..run.end() as usize
    })
}

/// Mixes two numbers.
pub(super) const fn mix(a: u64, b: u64) -> u64 {
    let mut z = a ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
