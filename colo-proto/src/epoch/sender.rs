//! The sending side of checkpoints: rounds while the guest runs, then one epoch after another.
//!
//! Reads top to bottom: a first synchronisation, a checkpoint step by step, pages and state on
//! their way, the end. A [`Sender`] knows no guest and no output: what a step means for those is
//! returned to the role.

use bytes::{Bytes, BytesMut};

use super::{
    lanes::LaneEnds,
    source::{Source, Transaction},
};
use crate::{
    config::Config,
    error::PeerFault,
    id::{Channel, Epoch, Generation, PAGE_SIZE, PageRuns, Slot},
    machine::{Body, Captured, Transmit},
    ram::{CacheMode, PageSet},
    time::Instant,
    wire::{
        BATCH_PAGES, BATCH_RUNS, FLAG_LIVE, HEAD_LEN, Head, Kind, RUN_LEN, decode_runs, encode_runs,
    },
};

/// Synchronisation rounds go on while each at least halves what is left, down to this many pages.
const SMALL_ROUND: u64 = 256;

/// What the primary sends, and how far it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Sender {
    source: Source,
    lanes: u8,
    /// Pages to send next: of a round, or of the captured epoch.
    pages: PageSet,
    /// Pages the secondary wrote itself and reported with its reply.
    theirs: PageSet,
    their_cache: CacheMode,
    /// The last round may leave as many.
    last_round: u64,
    /// Pages left after the previous round.
    left: u64,
    said_not_converging: bool,
}

/// What is known of a round once the guest has said what it wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Round {
    /// Little enough is left: an ordinary checkpoint sends it.
    Last,
    /// Another one is sent while the guest runs.
    Next {
        round: u32,
        pages: u64,
        /// The rounds do not get shorter, which is said once.
        not_converging: bool,
    },
}

impl Sender {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            source: Source::Alone,
            lanes: config.lanes,
            pages: PageSet::new(&config.slots),
            theirs: PageSet::new(&config.slots),
            their_cache: CacheMode::default(),
            last_round: config.last_round_pages,
            left: u64::MAX,
            said_not_converging: false,
        }
    }

    /// How the secondary keeps a coming epoch.
    pub(crate) const fn set_their_cache(&mut self, cache: CacheMode) {
        self.their_cache = cache;
    }

    // ---- what it is doing -----------------------------------------------------------------------

    pub(crate) const fn is_alone(&self) -> bool {
        matches!(self.source, Source::Alone)
    }

    /// Whether the pair is whole and no checkpoint is in hand.
    pub(crate) const fn is_between(&self) -> bool {
        matches!(self.source, Source::Running)
    }

    pub(crate) const fn transaction(&self) -> Option<&Transaction> {
        self.source.transaction()
    }

    /// The newest checkpoint that will not hold what the guest does from now on, if one is in hand.
    pub(crate) const fn captured_already(&self) -> Option<Epoch> {
        match (&self.source, self.source.transaction()) {
            (Source::Requesting(_), _) | (_, None) => None,
            (_, Some(tx)) => Some(tx.epoch),
        }
    }

    /// Whether the phase ends only if the peer or the guest side does something.
    pub(crate) const fn awaits(&self) -> bool {
        !self.is_alone() && !self.is_between()
    }

    /// Whether the secondary owes an answer to a checkpoint.
    pub(crate) const fn awaits_reply(&self) -> bool {
        matches!(
            self.source,
            Source::Requesting(_) | Source::AwaitingReceived(_) | Source::AwaitingLoaded(_)
        )
    }

    /// Whether under QEMU's order the guest is stopped in this phase.
    pub(crate) const fn stopped_until_loaded(&self) -> bool {
        self.source.stopped_until_loaded()
    }

    pub(crate) const fn name(&self) -> &'static str {
        self.source.name()
    }

    pub(crate) const fn out_of_phase(&self, kind: Kind) -> PeerFault {
        PeerFault::OutOfPhase {
            message: kind.name(),
            state: self.source.name(),
        }
    }

    /// The guest side says what was written.
    pub(crate) fn dirty(&mut self, slot: Slot, words: &[u64]) {
        self.pages.merge(slot, words);
    }

    // ---- first synchronisation ------------------------------------------------------------------

    /// Everything is to be sent; the guest is asked what it writes meanwhile.
    pub(crate) fn begin(&mut self) {
        self.pages.fill();
        self.left = u64::MAX;
        self.said_not_converging = false;
        self.source = Source::SyncHarvesting { round: 0 };
    }

    /// The guest has said what it wrote.
    pub(crate) fn harvested(&mut self) -> Option<Round> {
        let Source::SyncHarvesting { round } = self.source else {
            return None;
        };
        let pages = self.pages.count();
        let halves = pages <= self.left / 2;
        if round > 0 && pages <= self.last_round && (pages <= SMALL_ROUND || !halves) {
            return Some(Round::Last);
        }
        let not_converging =
            round > 0 && !halves && !core::mem::replace(&mut self.said_not_converging, true);
        self.left = pages;
        self.source = Source::SyncSending {
            round,
            pages,
            lanes: LaneEnds::default(),
        };
        Some(Round::Next {
            round,
            pages,
            not_converging,
        })
    }

    /// ROUND_DONE: the secondary has all pages of the round. Gives the round and its pages; the
    /// guest is asked what it wrote meanwhile.
    pub(crate) fn round_done(&mut self, number: u64) -> Result<(u32, u64), PeerFault> {
        match self.source {
            Source::SyncAwaitingDone { round, pages } if u64::from(round) == number => {
                self.source = Source::SyncHarvesting {
                    round: round.saturating_add(1),
                };
                Ok((round, pages))
            }
            _ => Err(self.out_of_phase(Kind::RoundDone)),
        }
    }

    // ---- a checkpoint, step by step -------------------------------------------------------------

    /// CHECKPOINT_REQUEST: the secondary stops; the guest here runs on.
    pub(crate) fn request(&mut self, tx: Transaction) {
        if !tx.first {
            self.pages.clear();
        }
        self.theirs.clear();
        self.source = Source::Requesting(tx);
    }

    /// OWN_DIRTY: what the secondary's guest wrote since the last checkpoint.
    pub(crate) fn own_dirty(&mut self, body: &[u8]) -> Result<(), PeerFault> {
        let message = Kind::OwnDirty.name();
        let expected = matches!(self.source, Source::Requesting(_));
        if !expected || self.their_cache == CacheMode::Full {
            return Err(self.out_of_phase(Kind::OwnDirty));
        }
        let runs = decode_runs(message, body).map_err(|error| PeerFault::Decode {
            channel: Channel::Control,
            error,
        })?;
        for run in &runs {
            if !self.theirs.insert(*run) {
                return Err(PeerFault::BadRun { message, run: *run });
            }
        }
        Ok(())
    }

    /// CHECKPOINT_REPLY: the secondary is stopped. Gives the epoch to capture, and the pages it
    /// needs besides what is dirty: those it wrote itself, and those the last live round left.
    pub(crate) fn reply(
        &mut self,
        now: Instant,
        number: u64,
    ) -> Result<(Epoch, PageRuns), PeerFault> {
        let mut tx = match &self.source {
            Source::Requesting(tx) if tx.epoch.0 == number => tx.clone(),
            _ => return Err(self.out_of_phase(Kind::CheckpointReply)),
        };
        tx.times.reply = tx.lap(now);
        self.pages.union(&self.theirs);
        let also = self.pages.take_runs(u32::MAX, usize::MAX);
        for run in &also {
            self.pages.insert(*run);
        }
        let epoch = tx.epoch;
        self.source = Source::Capturing(tx);
        Ok((epoch, also))
    }

    /// The guest side has copied: from now on pages and state may be sent. `None` if the capture
    /// was given up meanwhile.
    pub(crate) fn captured(&mut self, now: Instant, captured: &Captured) -> Option<Transaction> {
        let mut tx = match &self.source {
            Source::Capturing(tx) if tx.epoch == captured.epoch => tx.clone(),
            _ => return None,
        };
        tx.lap(now);
        tx.times.live = captured.live;
        tx.times.pause = captured.pause;
        tx.pages = self.pages.count();
        tx.inputs = captured.inputs;
        tx.state_len = captured.state_len;
        self.source = Source::Sending {
            tx: tx.clone(),
            lanes: LaneEnds::default(),
            state_sent: false,
        };
        Some(tx)
    }

    /// VMSTATE_RECEIVED: the commit point.
    pub(crate) fn received(&mut self, now: Instant, number: u64) -> Result<Transaction, PeerFault> {
        let mut tx = match &self.source {
            Source::AwaitingReceived(tx) if tx.epoch.0 == number => tx.clone(),
            _ => return Err(self.out_of_phase(Kind::VmstateReceived)),
        };
        tx.times.received = tx.lap(now);
        self.source = Source::AwaitingLoaded(tx.clone());
        Ok(tx)
    }

    /// VMSTATE_LOADED, or CHECKPOINT_READY for the first one: the secondary runs (lockstep) or
    /// waits (standby) with the new state.
    pub(crate) fn loaded(
        &mut self,
        now: Instant,
        number: u64,
        kind: Kind,
    ) -> Result<Transaction, PeerFault> {
        let ready = kind == Kind::CheckpointReady;
        let mut tx = match &self.source {
            Source::AwaitingLoaded(tx) if tx.epoch.0 == number && tx.first == ready => tx.clone(),
            _ => return Err(self.out_of_phase(kind)),
        };
        tx.times.loaded = tx.lap(now);
        self.source = Source::Running;
        Ok(tx)
    }

    /// The peer is of no use any more. Says whether a checkpoint was in hand.
    pub(crate) fn abandon(&mut self) -> bool {
        let aborted = self.source.transaction().is_some();
        self.source = Source::Alone;
        self.pages.clear();
        self.theirs.clear();
        aborted
    }

    // ---- pages and state on their way -----------------------------------------------------------

    /// The next contents for the channel, of about `budget` bytes, under this ownership.
    pub(crate) fn poll(
        &mut self,
        now: Instant,
        generation: Generation,
        channel: Channel,
        budget: usize,
    ) -> Option<Transmit> {
        let transmit = match channel {
            Channel::Ram(lane) => self.poll_pages(generation, lane, budget),
            Channel::Control => self.poll_state(generation),
            Channel::Net | Channel::Disk => None,
        }?;
        self.handed_out(now);
        Some(transmit)
    }

    fn poll_pages(&mut self, generation: Generation, lane: u8, budget: usize) -> Option<Transmit> {
        let (lanes, number, live) = match &mut self.source {
            Source::SyncSending { round, lanes, .. } => (lanes, u64::from(*round), true),
            Source::Sending { tx, lanes, .. } => (lanes, tx.epoch.0, false),
            _ => return None,
        };
        if lanes.has_ended(lane) {
            return None;
        }
        let flags = if live { FLAG_LIVE } else { 0 };
        let runs = self.pages.take_runs(pages_for(budget), BATCH_RUNS);
        if runs.is_empty() {
            lanes.end(lane);
            let mut head = Head::new(Kind::LaneEnd, generation, number);
            head.flags = flags;
            head.count = lanes.pages(lane);
            return Some(Transmit {
                head: head.with_body(&[]),
                body: Body::Empty,
            });
        }
        lanes.add(lane, u32::try_from(runs.pages()).unwrap_or(u32::MAX));
        let mut head = Head::new(Kind::Pages, generation, number);
        head.flags = flags;
        let head = pages_head(head, &runs);
        let body = if live {
            Body::Live(runs)
        } else {
            Body::Staged(runs)
        };
        Some(Transmit { head, body })
    }

    fn poll_state(&mut self, generation: Generation) -> Option<Transmit> {
        let Source::Sending { tx, state_sent, .. } = &mut self.source else {
            return None;
        };
        if core::mem::replace(state_sent, true) {
            return None;
        }
        let mut head = Head::new(Kind::VmstateSize, generation, tx.epoch.0);
        // Bounded by `state_bytes`, which is at most 1 GiB.
        head.len = u32::try_from(tx.state_len).unwrap_or(u32::MAX);
        let mut out = BytesMut::with_capacity(HEAD_LEN);
        head.put(&mut out);
        let body = if tx.state_len == 0 {
            Body::Empty
        } else {
            Body::State(0..tx.state_len)
        };
        Some(Transmit {
            head: out.freeze(),
            body,
        })
    }

    /// After a message: whether that was the last of a round or an epoch.
    fn handed_out(&mut self, now: Instant) {
        match &self.source {
            Source::SyncSending {
                round,
                pages,
                lanes,
            } if lanes.all_ended(self.lanes) => {
                let (round, pages) = (*round, *pages);
                self.source = Source::SyncAwaitingDone { round, pages };
            }
            Source::Sending {
                tx,
                lanes,
                state_sent: true,
            } if lanes.all_ended(self.lanes) => {
                let mut tx = tx.clone();
                tx.times.send = tx.lap(now);
                self.source = Source::AwaitingReceived(tx);
            }
            _ => {}
        }
    }
}

/// Pages that fit a send budget in bytes.
fn pages_for(budget: usize) -> u32 {
    let pages = budget as u64 / PAGE_SIZE;
    u32::try_from(pages)
        .unwrap_or(u32::MAX)
        .clamp(1, BATCH_PAGES)
}

/// Head and table of one batch.
fn pages_head(mut head: Head, runs: &PageRuns) -> Bytes {
    let table = runs.as_slice().len() * RUN_LEN;
    head.count = u32::try_from(runs.as_slice().len()).unwrap_or(u32::MAX);
    head.arg = u32::try_from(runs.pages()).unwrap_or(u32::MAX);
    head.len = u32::try_from(table as u64 + runs.pages() * PAGE_SIZE).unwrap_or(u32::MAX);
    let mut out = BytesMut::with_capacity(HEAD_LEN + table);
    head.put(&mut out);
    encode_runs(runs, &mut out);
    out.freeze()
}
