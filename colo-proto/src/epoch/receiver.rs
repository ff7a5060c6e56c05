//! The receiving side of checkpoints: rounds into memory, then one epoch after another into the
//! cache, and from there, whole, into the guest.
//!
//! Two rules above all: a half-received checkpoint never touches the replica, and a whole one is
//! applied even if the peer is gone.
//!
//! Reads top to bottom: a first synchronisation, a checkpoint step by step, the end. A [`Receiver`]
//! knows no guest, no output and no channel: what a step means for those is returned to the role.

use super::{
    lanes::LaneEnds,
    target::{Announced, Coming, StateBytes, Target, Whole},
};
use crate::{
    config::Config,
    error::PeerFault,
    id::{Channel, Epoch, PageRun, PageRuns, Slot},
    machine::{GuestOp, ReplicationOp, Sink},
    mutation::bug,
    output::within_reach,
    ram::{Cache, CacheMode, PageSet},
    status::Mode,
    wire::{BATCH_RUNS, FLAG_LIVE, Head, Kind, VmstateSend, decode_runs},
};

/// What the secondary holds, and how far the next epoch is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Receiver {
    #[cfg(feature = "mutations")]
    bug: Option<crate::Bug>,
    mode: CacheMode,
    most_state: u64,
    lanes: u8,
    target: Target,
    cache: Cache,
    /// Own dirty pages still to be reported with the reply.
    reporting: PageSet,
    /// The guest ran since the last commit, so that it may have written memory.
    ran: bool,
}

/// What is to be done next.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Step {
    Nothing,
    /// Say this on Control.
    Tell(Kind, u64),
    /// Have the guest side do this.
    Do(GuestOp),
}

/// What a lost peer left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    /// Nothing that was in hand.
    Nothing,
    /// Half a synchronisation: no replica.
    Sync,
    /// Half a checkpoint: the replica is what it was.
    Checkpoint,
}

impl Receiver {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            #[cfg(feature = "mutations")]
            bug: config.bug,
            mode: config.cache,
            most_state: config.state_bytes,
            lanes: config.lanes,
            target: Target::Empty,
            cache: Cache::new(config.cache, &config.slots),
            reporting: PageSet::new(&config.slots),
            ran: false,
        }
    }

    // ---- what it is doing -----------------------------------------------------------------------

    /// Whether there is no replica here.
    pub(crate) const fn is_empty(&self) -> bool {
        matches!(self.target, Target::Empty)
    }

    /// Whether the replica is whole and nothing is under way.
    pub(crate) const fn is_whole(&self) -> bool {
        matches!(self.target, Target::Shadowing)
    }

    /// Whether a replica would be whole if the peer were lost now, before any load ends.
    pub(crate) fn has_replica(&self) -> bool {
        self.is_whole() || self.target.coming().is_some_and(|c| !c.first)
    }

    /// Whether a checkpoint is past its commit point and not yet loaded.
    pub(crate) const fn loading(&self) -> bool {
        self.target.loading()
    }

    /// Whether the phase ends only if the peer or the guest side does something.
    pub(crate) const fn awaits(&self) -> bool {
        !self.is_empty() && !self.is_whole()
    }

    /// The checkpoint whose state is being verified.
    pub(crate) const fn checks(&self) -> Option<Epoch> {
        match &self.target {
            Target::Checking(coming) => Some(coming.epoch),
            _ => None,
        }
    }

    pub(crate) const fn name(&self) -> &'static str {
        self.target.name()
    }

    pub(crate) const fn out_of_phase(&self, kind: Kind) -> PeerFault {
        PeerFault::OutOfPhase {
            message: kind.name(),
            state: self.target.name(),
        }
    }

    /// The guest here was resumed.
    pub(crate) const fn resumed(&mut self) {
        self.ran = true;
    }

    /// The guest side says what was written here.
    pub(crate) fn own_dirty(&mut self, slot: Slot, words: &[u64]) {
        self.cache.own_dirty(slot, words);
    }

    // ---- first synchronisation ------------------------------------------------------------------

    /// Whether a live message is the first of round 0, which begins with it: all memory is replaced,
    /// and what the guest of an earlier pairing wrote is of no account.
    pub(crate) fn begins(&mut self, head: &Head) -> bool {
        let begins = self.is_empty() && head.flags & FLAG_LIVE != 0 && head.number == 0;
        if begins {
            self.cache.begin_anew();
            self.ran = false;
            self.target = Target::Synchronising {
                round: 0,
                lanes: LaneEnds::default(),
            };
        }
        begins
    }

    /// The ends of the live round `number`.
    fn round(&mut self, number: u64, kind: Kind) -> Result<&mut LaneEnds, PeerFault> {
        let fault = self.out_of_phase(kind);
        match &mut self.target {
            Target::Synchronising { round, lanes } if u64::from(*round) == number => Ok(lanes),
            _ => Err(fault),
        }
    }

    // ---- pages, live and staged -----------------------------------------------------------------

    /// The table of a batch.
    pub(crate) fn table(
        channel: Channel,
        head: &Head,
        table: &[u8],
    ) -> Result<PageRuns, PeerFault> {
        let message = Kind::Pages.name();
        let runs =
            decode_runs(message, table).map_err(|error| PeerFault::Decode { channel, error })?;
        if runs.pages() == u64::from(head.arg) {
            return Ok(runs);
        }
        Err(PeerFault::Field {
            message,
            field: "arg",
            got: u64::from(head.arg),
            expected: runs.pages(),
        })
    }

    /// PAGES: decides where they go, before a byte of them is read.
    pub(crate) fn pages(
        &mut self,
        lane: u8,
        head: &Head,
        runs: PageRuns,
    ) -> Result<Sink, PeerFault> {
        let (full, message) = (self.mode == CacheMode::Full, Kind::Pages.name());
        if head.flags & FLAG_LIVE != 0 {
            let lanes = self.round(head.number, Kind::Pages)?;
            if lanes.has_ended(lane) {
                return Err(self.out_of_phase(Kind::Pages));
            }
            lanes.add(lane, head.arg);
            for run in &runs {
                if !self.cache.within(*run) {
                    return Err(PeerFault::BadRun { message, run: *run });
                }
                if full {
                    self.cache.receive(*run);
                }
            }
            return Ok(if full {
                Sink::Cache(runs)
            } else {
                Sink::Guest(runs)
            });
        }
        let coming = self.receiving(head.number, Kind::Pages)?;
        let first = coming.first;
        if coming.lanes.has_ended(lane) {
            return Err(self.out_of_phase(Kind::Pages));
        }
        coming.lanes.add(lane, head.arg);
        for run in &runs {
            // With a full cache the live rounds were received too; there a page may come again.
            let again = self.cache.has(*run) && !(first && full);
            self.arrive(*run, again)?;
        }
        Ok(Sink::Cache(runs))
    }

    fn arrive(&mut self, run: PageRun, again: bool) -> Result<(), PeerFault> {
        let message = Kind::Pages.name();
        if again {
            return Err(PeerFault::Repeated { message, run });
        }
        if !self.cache.receive(run) {
            return Err(PeerFault::BadRun { message, run });
        }
        Ok(())
    }

    /// LANE_END: all pages of the round or the epoch on this lane were sent.
    pub(crate) fn lane_end(&mut self, lane: u8, head: &Head) -> Result<Step, PeerFault> {
        let live = head.flags & FLAG_LIVE != 0;
        let lanes = self.lanes;
        let ends = if live {
            self.round(head.number, Kind::LaneEnd)?
        } else {
            &mut self.receiving(head.number, Kind::LaneEnd)?.lanes
        };
        if ends.pages(lane) != head.count {
            return Err(PeerFault::Field {
                message: Kind::LaneEnd.name(),
                field: "count",
                got: u64::from(head.count),
                expected: u64::from(ends.pages(lane)),
            });
        }
        if !ends.end(lane) {
            return Err(self.out_of_phase(Kind::LaneEnd));
        }
        if !live || !ends.all_ended(lanes) {
            return Ok(Step::Nothing);
        }
        self.target = Target::Synchronising {
            round: u32::try_from(head.number)
                .unwrap_or(u32::MAX)
                .saturating_add(1),
            lanes: LaneEnds::default(),
        };
        Ok(Step::Tell(Kind::RoundDone, head.number))
    }

    // ---- a checkpoint, step by step -------------------------------------------------------------

    /// CHECKPOINT_REQUEST: the guest here is to stop. `newest` is the epoch held.
    pub(crate) fn request(&mut self, newest: Epoch, number: u64) -> Result<(), PeerFault> {
        let first = match self.target {
            Target::Synchronising { .. } => true,
            Target::Shadowing => false,
            _ => return Err(self.out_of_phase(Kind::CheckpointRequest)),
        };
        if number <= newest.0 && !first {
            return Err(PeerFault::Field {
                message: Kind::CheckpointRequest.name(),
                field: "epoch",
                got: number,
                expected: newest.0.saturating_add(1),
            });
        }
        self.target = Target::Pausing(Coming::new(Epoch(number), first));
        Ok(())
    }

    /// The guest here stands still. `None` if nobody waits for that.
    pub(crate) fn paused(&mut self) -> Option<Step> {
        let Target::Pausing(coming) = self.target else {
            return None;
        };
        self.target = Target::Harvesting(coming);
        if self.ran {
            return Some(Step::Do(GuestOp::Harvest));
        }
        Some(self.harvested())
    }

    /// What this side wrote itself is known: report it, then reply.
    pub(crate) fn harvested(&mut self) -> Step {
        let Target::Harvesting(coming) = self.target else {
            return Step::Nothing;
        };
        self.reporting.clear();
        let forgets = bug!(self, OwnPagesForgotten);
        if self.mode == CacheMode::Union && !coming.first && !forgets {
            self.reporting.union(self.cache.own());
        }
        self.target = Target::Replying(coming);
        self.reply()
    }

    /// The next pages to report as OWN_DIRTY, and then the reply.
    pub(crate) fn poll_report(&mut self) -> Option<(PageRuns, Step)> {
        if !matches!(self.target, Target::Replying(_)) {
            return None;
        }
        let runs = self.reporting.take_runs(u32::MAX, BATCH_RUNS * 4);
        Some((runs, self.reply()))
    }

    /// CHECKPOINT_REPLY follows the last report.
    fn reply(&mut self) -> Step {
        match self.target {
            Target::Replying(coming) if self.reporting.is_empty() => {
                self.target = Target::Receiving(coming);
                Step::Tell(Kind::CheckpointReply, coming.epoch.0)
            }
            _ => Step::Nothing,
        }
    }

    fn receiving(&mut self, number: u64, kind: Kind) -> Result<&mut Coming, PeerFault> {
        let fault = self.out_of_phase(kind);
        match &mut self.target {
            Target::Receiving(coming) if coming.epoch.0 == number => Ok(coming),
            _ => Err(fault),
        }
    }

    /// VMSTATE_SEND: what is to come.
    pub(crate) fn announced(&mut self, head: &Head, body: &[u8]) -> Result<(), PeerFault> {
        let message = Kind::VmstateSend.name();
        let send = VmstateSend::decode(body).map_err(|error| PeerFault::Decode {
            channel: Channel::Control,
            error,
        })?;
        let mode = match head.arg {
            0 => Mode::Standby,
            1 => Mode::Lockstep,
            other => {
                return Err(PeerFault::OverLimit {
                    message,
                    field: "mode",
                    got: u64::from(other),
                    limit: 1,
                });
            }
        };
        within_reach(message, "inputs", send.inputs)?;
        let fault = self.out_of_phase(Kind::VmstateSend);
        let coming = self.receiving(head.number, Kind::VmstateSend)?;
        if coming.announced.is_some() {
            return Err(fault);
        }
        coming.announced = Some(Announced {
            mode,
            inputs: send.inputs,
            pages: send.pages,
        });
        Ok(())
    }

    /// VMSTATE_SIZE: where the device state goes; `None` if there is none.
    pub(crate) fn state(&mut self, head: &Head) -> Result<Option<Sink>, PeerFault> {
        let (len, limit) = (u64::from(head.len), self.most_state);
        if len > limit {
            return Err(PeerFault::OverLimit {
                message: Kind::VmstateSize.name(),
                field: "size",
                got: len,
                limit,
            });
        }
        let fault = self.out_of_phase(Kind::VmstateSize);
        let coming = self.receiving(head.number, Kind::VmstateSize)?;
        if coming.state != StateBytes::None || coming.announced.is_none() {
            return Err(fault);
        }
        if len == 0 {
            coming.state = StateBytes::Here(0);
            return Ok(None);
        }
        coming.state = StateBytes::Coming(len);
        Ok(Some(Sink::State(0..len)))
    }

    /// The contents of a message are in place.
    pub(crate) fn placed(&mut self, head: &Head) {
        let Target::Receiving(coming) = &mut self.target else {
            return;
        };
        if head.kind == Kind::VmstateSize {
            if let StateBytes::Coming(len) = coming.state {
                coming.state = StateBytes::Here(len);
                if bug!(self, CommitPartial) {
                    coming.pages = coming.announced.map_or(0, |a| a.pages);
                    for lane in 0..self.lanes {
                        coming.lanes.end(lane);
                    }
                }
            }
        } else if head.flags & FLAG_LIVE == 0 {
            coming.pages += u64::from(head.arg);
        }
    }

    /// Whether everything is here; then the guest side verifies the state. `placing` says whether
    /// contents are still on their way into place.
    pub(crate) fn check(&mut self, placing: bool) -> Result<Step, PeerFault> {
        let Target::Receiving(coming) = self.target else {
            return Ok(Step::Nothing);
        };
        let wrong = |announced: Announced| PeerFault::Field {
            message: Kind::VmstateSend.name(),
            field: "pages",
            got: announced.pages,
            expected: coming.pages,
        };
        if let Some(a) = coming.announced.filter(|a| coming.pages > a.pages) {
            return Err(wrong(a));
        }
        if coming.whole(self.lanes).is_none() {
            let all_here = coming.lanes.all_ended(self.lanes) && !placing;
            let short = coming
                .announced
                .filter(|a| all_here && a.pages != coming.pages);
            return match (short, coming.state) {
                (Some(a), StateBytes::Here(_)) => Err(wrong(a)),
                _ => Ok(Step::Nothing),
            };
        }
        let mut missing = !self.cache.covers_own();
        missing &= !bug!(self, OwnPagesForgotten);
        missing &= !bug!(self, CommitPartial);
        if missing {
            return Err(PeerFault::Field {
                message: Kind::VmstateSend.name(),
                field: "own dirty pages sent back",
                got: 0,
                expected: 1,
            });
        }
        self.target = Target::Checking(coming);
        Ok(Step::Do(GuestOp::CheckState(coming.epoch)))
    }

    /// The state can be loaded: this is the commit point, which VMSTATE_RECEIVED tells. From here on
    /// this side finishes by itself. Gives what to copy into the guest.
    pub(crate) fn checked(&mut self) -> Option<(Whole, PageRuns)> {
        let Target::Checking(coming) = self.target else {
            return None;
        };
        let whole = coming.whole(self.lanes)?;
        self.target = Target::CommittingRam(whole);
        Some((whole, self.cache.commit()))
    }

    /// Memory holds the epoch; disks follow.
    pub(crate) fn ram_committed(&mut self, epoch: Epoch) -> Step {
        match self.target {
            Target::CommittingRam(whole) if whole.epoch == epoch => {
                self.target = Target::Replicating(whole);
                Step::Do(GuestOp::Replication(ReplicationOp::Checkpoint))
            }
            _ => Step::Nothing,
        }
    }

    /// Disks hold the epoch; devices follow. Gives the epoch, and what loads its state.
    pub(crate) fn replicated(&mut self) -> Option<(Epoch, GuestOp)> {
        let Target::Replicating(whole) = self.target else {
            return None;
        };
        self.target = Target::LoadingState(whole);
        let (epoch, inputs) = (whole.epoch, whole.inputs);
        Some((epoch, GuestOp::LoadState { epoch, inputs }))
    }

    /// VMSTATE_LOADED (CHECKPOINT_READY for the first): the guest here has the primary's state.
    pub(crate) fn loaded(&mut self, epoch: Epoch) -> Option<Whole> {
        match self.target {
            Target::LoadingState(whole) if whole.epoch == epoch => {
                self.target = Target::Shadowing;
                self.ran = false;
                Some(whole)
            }
            _ => None,
        }
    }

    // ---- the end --------------------------------------------------------------------------------

    /// The peer is of no use any more. A checkpoint before its commit point leaves no trace; one
    /// after it goes on.
    pub(crate) fn abandon(&mut self) -> Broken {
        let dropped = bug!(self, WholeDroppedOnLoss) && self.loading();
        let broken = match &self.target {
            _ if dropped => {
                self.target = Target::Shadowing;
                Broken::Checkpoint
            }
            Target::Synchronising { .. } => {
                self.target = Target::Empty;
                Broken::Sync
            }
            target => match target.coming().map(|coming| coming.first) {
                None => Broken::Nothing,
                Some(first) => {
                    self.target = if first {
                        Target::Empty
                    } else {
                        Target::Shadowing
                    };
                    Broken::Checkpoint
                }
            },
        };
        if !self.loading() {
            self.cache.abandon();
        }
        self.reporting.clear();
        broken
    }

    /// Whatever replica there was must not be run.
    pub(crate) fn discard(&mut self) {
        self.target = Target::Empty;
    }

    /// Seeded: applies what has arrived, though it is not whole.
    #[cfg(feature = "mutations")]
    pub(crate) fn half_applied(&mut self) -> Option<GuestOp> {
        let Target::Receiving(coming) = self.target else {
            return None;
        };
        let (a, StateBytes::Here(state_len)) = (coming.announced?, coming.state) else {
            return None;
        };
        let (runs, epoch) = (self.cache.commit(), coming.epoch);
        self.target = Target::CommittingRam(Whole {
            epoch,
            first: coming.first,
            mode: a.mode,
            inputs: a.inputs,
            state_len,
            pages: coming.pages,
        });
        Some(GuestOp::CommitRam { epoch, runs })
    }
}
