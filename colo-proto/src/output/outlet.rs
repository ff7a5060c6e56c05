//! May this frame leave? The one answer, in both roles.
//!
//! A frame of the guest leaves a [`Serving`] host if a checkpoint covers it, if both guests have
//! said it, if it belongs to a class that is never held, or if nobody else could take over; and
//! then only under a permit. A frame of a [`Shadowing`] host's guest never leaves; it is kept until
//! the world has heard it from the other host, and said again if this host takes over.
//!
//! An [`Outlet`] knows no phase of a checkpoint and no channel. What a role must pass on is
//! returned as [`News`].

use alloc::collections::VecDeque;
use bytes::Bytes;
use core::time::Duration;

use super::{
    agreement::{Agreement, Stored},
    class::passes,
    flow::{Difference, Divergence, Limits, Report},
    gate::Gate,
    input::{InputLog, Logged, NotStored, StoredInputs},
    shadow::Shadow,
    translate::{Lasting, Translator},
};
use crate::{
    config::{Config, PassThrough},
    error::{Misuse, PeerFault},
    event::{Cause, Queue},
    id::Epoch,
    machine::{Deadline, Output, TimerKind},
    member::Permit,
    mutation::bug,
    stats::Stats,
    status::Mode,
    time::Instant,
    wire::Kind,
};

/// Pauses before the second and later announcements of where the VM lives.
const ROUNDS: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(150),
    Duration::from_millis(250),
    Duration::from_millis(350),
];

/// What leaves a host, and what its guest is given: as a [`Serving`] or as a [`Shadowing`] host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Outlet<Side> {
    #[cfg(feature = "mutations")]
    bug: Option<crate::Bug>,
    pass: PassThrough,
    most_bytes: usize,
    /// How the interval between two checkpoints runs.
    mode: Mode,
    limits: Limits,
    /// Keys the tables of flows.
    seed: u64,
    now: Instant,
    gate: Gate,
    translator: Translator,
    counts: Counts,
    side: Side,
}

/// The side of the host that has the VM.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Serving {
    /// The epoch that this host took over from: what was said before never happened.
    born: Epoch,
    /// Output said after this capture is held; `None`: output leaves at once.
    hold_from: Option<Epoch>,
    waiting: Agreement,
    inputs: InputLog,
    mirroring: bool,
    /// When the world is told next where the VM lives, and how often that was done.
    announce: Option<(Instant, usize)>,
    /// How many reports the other host has stored.
    reports: u64,
    /// How guests have parted, not yet passed on.
    parted: VecDeque<Divergence>,
    /// Client frames that the guest here was to be given before this host took over.
    backlog: VecDeque<(u64, Bytes)>,
}

/// The side of the host that may take over.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shadowing {
    stored: StoredInputs,
    /// Something was stored that has not been acknowledged.
    unacknowledged: bool,
    /// Reports stored.
    reports: u64,
    shadow: Shadow,
}

/// What the role has to pass on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[must_use]
pub(crate) struct News {
    /// A queue was full and something was dropped.
    pub(crate) full: Option<Queue>,
    /// A checkpoint is wanted.
    pub(crate) wants: Option<Cause>,
    /// So many of the other guest's first frames since the checkpoint need not be said again.
    pub(crate) left: Option<(Epoch, u64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
struct Counts {
    released: u64,
    matched: u64,
    dropped: u64,
    diverged: u64,
    inputs: u64,
}

impl<Side> Outlet<Side> {
    pub(crate) const fn mode(&self) -> Mode {
        self.mode
    }

    /// Sets the mode. Gives it back if that is a change.
    pub(crate) fn set_mode(&mut self, mode: Mode) -> Option<Mode> {
        (core::mem::replace(&mut self.mode, mode) != mode).then_some(mode)
    }

    /// Adds what was counted here.
    pub(crate) const fn count(&self, mut stats: Stats) -> Stats {
        stats.released += self.counts.released;
        stats.matched += self.counts.matched;
        stats.dropped += self.counts.dropped;
        stats.diverged += self.counts.diverged;
        stats.inputs += self.counts.inputs;
        stats
    }

    /// Lets a frame out as soon as there is a permit.
    fn release(&mut self, frame: Bytes, news: &mut News) {
        let frame = self.translator.from_guest(self.now, frame);
        if !self.gate.push(frame) {
            self.counts.dropped += 1;
            news.full = Some(Queue::Gate);
        }
    }

    /// The same outlet for another part of the pair.
    fn becomes<Other>(self, side: Other) -> Outlet<Other> {
        Outlet {
            #[cfg(feature = "mutations")]
            bug: self.bug,
            pass: self.pass,
            most_bytes: self.most_bytes,
            mode: self.mode,
            limits: self.limits,
            seed: self.seed,
            now: self.now,
            gate: self.gate,
            translator: self.translator,
            counts: self.counts,
            side,
        }
    }
}

impl Outlet<Serving> {
    /// Of a host that has had the VM from `born` on. Client frames are numbered on from `newest`,
    /// which the guest may have consumed already.
    pub(crate) fn serving(config: &Config, seed: u64, born: Epoch, newest: u64) -> Self {
        let limits = limits(config);
        let mut translator = Translator::new(limits.header, seed);
        translator.take_over();
        Self {
            #[cfg(feature = "mutations")]
            bug: config.bug,
            pass: config.pass,
            most_bytes: config.hold_bytes,
            mode: config.mode,
            limits,
            seed,
            now: Instant::ZERO,
            gate: Gate::new(config.hold_bytes),
            translator,
            counts: Counts::NONE,
            side: Serving::new(limits, seed, born, newest),
        }
    }

    /// The VM belongs to the other host: nothing that waits here may ever leave.
    pub(crate) fn give_up(mut self) -> Outlet<Shadowing> {
        self.gate.clear();
        self.translator.clear();
        while self.side.waiting.any().is_some() {
            self.counts.dropped += 1;
        }
        let side = Shadowing::new(self.most_bytes);
        self.becomes(side)
    }

    /// The next frame for the world, or the next word to it of where the VM lives, if there is a
    /// permit. A round of announcements that has none is left out.
    pub(crate) fn poll(&mut self, now: Instant, permit: Option<Permit>) -> Option<Output> {
        if let Some((at, round)) = self.side.announce
            && now >= at
        {
            let pause = ROUNDS.get(round);
            self.side.announce = pause.map(|pause| (now + *pause, round + 1));
            if let Some(permit) = permit {
                return Some(Output::Announce(permit));
            }
        }
        let output = self.gate.poll(permit)?;
        self.counts.released += 1;
        Some(output)
    }

    /// The VM lives here from now on, which is said several times.
    pub(crate) const fn announce(&mut self, now: Instant) {
        self.side.announce = Some((now, 0));
    }

    /// When it is said again.
    pub(crate) fn announcement(&self) -> Option<Deadline> {
        self.side.announce.map(|(at, _)| Deadline {
            at,
            why: TimerKind::Announce,
        })
    }

    /// Ownership is in doubt: what was released and has not left never will.
    pub(crate) fn fence(&mut self) {
        self.gate.clear();
        self.side.announce = None;
    }

    /// A frame that the guest here said after capture `since`; `newest` is the newest there is.
    pub(crate) fn said(
        &mut self,
        now: Instant,
        newest: Epoch,
        since: Epoch,
        frame: Bytes,
    ) -> Result<News, Misuse> {
        self.now = now;
        let mut news = News::default();
        if since > newest {
            return Err(Misuse::WrongEpoch { got: since, newest });
        }
        // Said by a guest that was replaced before this host became the primary: it never happened.
        if since < self.side.born {
            return Ok(news);
        }
        let held = self.side.hold_from.is_some_and(|from| since >= from);
        if !held || passes(self.pass, &frame) {
            self.release(frame, &mut news);
            return Ok(news);
        }
        let given = self.side.inputs.last();
        let compare = self.mode == Mode::Lockstep;
        if self.side.waiting.ours(now, since, given, frame, compare) {
            self.release_agreed(&mut news);
        } else {
            self.counts.dropped += 1;
            news.full = Some(Queue::Held);
        }
        if self.side.waiting.filling() {
            news.wants.get_or_insert(Cause::Full);
        }
        Ok(news)
    }

    /// A frame that the other host's guest said after checkpoint `epoch`; `newest` is the newest
    /// capture.
    pub(crate) fn said_there(
        &mut self,
        now: Instant,
        newest: Epoch,
        epoch: Epoch,
        frame: Bytes,
    ) -> Result<News, PeerFault> {
        self.now = now;
        let mut news = News::default();
        if epoch > newest {
            return Err(PeerFault::Field {
                message: Kind::Output.name(),
                field: "epoch",
                got: epoch.0,
                expected: newest.0,
            });
        }
        if self.mode == Mode::Standby {
            return Ok(news);
        }
        #[cfg(feature = "mutations")]
        let (epoch, frame) = self.mutated(epoch, frame);
        self.side.waiting.theirs(now, epoch, &frame);
        self.release_agreed(&mut news);
        Ok(news)
    }

    #[cfg(feature = "mutations")]
    fn mutated(&self, epoch: Epoch, frame: Bytes) -> (Epoch, Bytes) {
        let said = self.side.waiting.first();
        let said = said.filter(|_| bug!(self, MismatchIgnored));
        let stale = bug!(self, StaleOutputCompared);
        let epoch = if stale {
            self.side.waiting.epoch()
        } else {
            epoch
        };
        (epoch, said.unwrap_or(frame))
    }

    /// A client's frame, as the guest here knows its connection. `None` if it must wait for the
    /// guest to open it.
    pub(crate) fn heard(&mut self, now: Instant, frame: Bytes) -> Option<Bytes> {
        self.now = now;
        self.translator.to_guest(now, 0, frame)
    }

    /// The next client's frame that waited for the guest.
    pub(crate) fn poll_heard(&mut self) -> Option<Bytes> {
        Some(self.translator.poll_ready()?.1)
    }

    /// The next client frame that was stored here for a guest that is now the VM.
    pub(crate) fn poll_backlog(&mut self) -> Option<(u64, Bytes)> {
        self.side.backlog.pop_front()
    }

    /// A client's frame of this length. `room` says whether the peer could be sent it.
    ///
    /// # Errors
    /// If it cannot be numbered now: neither guest may see it, as if the wire had lost it.
    pub(crate) fn number(&mut self, len: usize, room: bool) -> Result<(Logged, News), News> {
        let mirroring = self.side.mirroring;
        let logged = (room || !mirroring).then(|| self.side.inputs.push(len, mirroring));
        let Some(logged) = logged.flatten() else {
            self.counts.dropped += 1;
            return Err(News {
                full: Some(Queue::Inputs),
                wants: Some(Cause::Full),
                left: None,
            });
        };
        self.counts.inputs += 1;
        let mut news = News::default();
        if mirroring && self.side.inputs.filling() {
            news.wants = Some(Cause::Full);
        }
        Ok((logged, news))
    }

    /// Whether client frames go to the other host too.
    pub(crate) const fn mirrors(&self) -> bool {
        self.side.mirroring
    }

    /// The other host has stored client frames up to this index, and so many reports, modulo 2^32.
    pub(crate) fn acknowledged(&mut self, index: u64, reports: u32) -> Result<News, PeerFault> {
        if !self.side.inputs.ack(index) {
            return Err(PeerFault::Field {
                message: Kind::InputAck.name(),
                field: "index",
                got: index,
                expected: self.side.inputs.last(),
            });
        }
        let reported = self.side.waiting.reported();
        let behind = u64::from((reported as u32).wrapping_sub(reports));
        let Some(stored) = reported.checked_sub(behind) else {
            return Err(PeerFault::Field {
                message: Kind::InputAck.name(),
                field: "reports",
                got: u64::from(reports),
                expected: reported,
            });
        };
        self.side.reports = self.side.reports.max(stored);
        let mut news = News::default();
        self.release_agreed(&mut news);
        Ok(news)
    }

    /// The next thing that the other host must know of a connection.
    pub(crate) fn poll_report(&mut self) -> Option<Report> {
        self.side.waiting.poll_report()
    }

    /// What another secondary must know of connections from before it was one.
    pub(crate) fn lasting(&self) -> impl Iterator<Item = Lasting> {
        self.translator.lasting()
    }

    /// How guests have parted in a conversation.
    pub(crate) fn poll_parted(&mut self) -> Option<Divergence> {
        self.side.parted.pop_front()
    }

    /// A checkpoint was asked for, after which the pair runs in this mode. From here on client
    /// frames are kept on the other host, which starts from the state captured now.
    pub(crate) fn requested(&mut self, mode: Mode) {
        if mode == Mode::Lockstep && !self.side.mirroring {
            self.side.mirroring = true;
            self.side.inputs.forget_peer();
        }
    }

    /// The guest is about to be captured: what it says from then on is held.
    pub(crate) fn capturing(&mut self, epoch: Epoch) {
        self.side.hold_from.get_or_insert(epoch);
    }

    /// The state is captured: whatever a frame waited for, a checkpoint is on its way.
    pub(crate) fn captured(&mut self, epoch: Epoch) -> News {
        let mut news = News::default();
        if bug!(self, ReleaseBeforeReceived) {
            self.release_covered(epoch, &mut news);
        }
        news
    }

    /// The other host holds checkpoint `epoch`, which consumed client frames up to `inputs`: what
    /// was said before its capture may leave, and the next interval runs in `mode`.
    pub(crate) fn commit(
        &mut self,
        now: Instant,
        epoch: Epoch,
        inputs: u64,
        mode: Mode,
    ) -> (News, Option<Mode>) {
        self.now = now;
        let mut news = News::default();
        let covered = if bug!(self, NewOutputWithOld) {
            epoch.next()
        } else {
            epoch
        };
        self.release_covered(covered, &mut news);
        self.side.inputs.cut(inputs);
        let lockstep = mode == Mode::Lockstep;
        self.side.waiting.commit(now, epoch, lockstep);
        self.side.mirroring = lockstep;
        let changed = self.set_mode(mode);
        self.release_agreed(&mut news);
        (news, changed)
    }

    /// The peer is gone: it stores nothing and says nothing. Whether it may own the VM is open, so
    /// that what is held stays so.
    pub(crate) fn forget_peer(&mut self) {
        self.side.mirroring = false;
        self.side.inputs.forget_peer();
        self.side.waiting.forget_peer();
        self.side.reports = 0;
    }

    /// Nobody else can own the VM now: everything that was held may leave.
    pub(crate) fn open(&mut self, epoch: Epoch) -> News {
        let mut news = News::default();
        self.side.hold_from = None;
        while let Some(frame) = self.side.waiting.any() {
            self.release(frame, &mut news);
        }
        self.side.waiting.open(self.now, epoch);
        news
    }

    /// The other host's guest runs from now on.
    pub(crate) fn resumed(&mut self, now: Instant) {
        self.side.waiting.resumed(now);
    }

    /// When a frame has waited too long for its match.
    pub(crate) fn unmatched_at(&self) -> Option<Instant> {
        let compares = self.mode == Mode::Lockstep;
        compares.then(|| self.side.waiting.poll_timeout()).flatten()
    }

    /// Looks for frames that have: a checkpoint is asked for, once an interval of each conversation.
    pub(crate) fn watch(&mut self, now: Instant) -> News {
        let mut news = News::default();
        self.side.waiting.handle_timeout(now);
        self.release_agreed(&mut news);
        news
    }

    fn release_covered(&mut self, epoch: Epoch, news: &mut News) {
        while let Some(frame) = self.side.waiting.covered(epoch) {
            self.release(frame, news);
        }
    }

    fn release_agreed(&mut self, news: &mut News) {
        let stored = Stored {
            inputs: self.side.inputs.acked(),
            reports: self.side.reports,
        };
        while let Some(frame) = self.side.waiting.agreed(stored) {
            self.counts.matched += 1;
            self.release(frame, news);
        }
        if let Some(left) = self.side.waiting.left() {
            news.left = Some((self.side.waiting.epoch(), left));
        }
        while let Some(parted) = self.side.waiting.parted() {
            self.counts.diverged += 1;
            news.wants.get_or_insert(match parted.cause {
                Difference::Unanswered => Cause::Unanswered,
                _ => Cause::Diverged,
            });
            if self.side.parted.len() < MOST_PARTED {
                self.side.parted.push_back(parted);
            }
        }
    }
}

impl Serving {
    const fn new(limits: Limits, seed: u64, born: Epoch, newest: u64) -> Self {
        Self {
            born,
            hold_from: None,
            waiting: Agreement::new(limits, seed),
            inputs: InputLog::after(newest, limits.bytes),
            mirroring: false,
            announce: None,
            reports: 0,
            parted: VecDeque::new(),
            backlog: VecDeque::new(),
        }
    }
}

impl Outlet<Shadowing> {
    /// Of a host without a replica.
    pub(crate) const fn shadowing(config: &Config, seed: u64) -> Self {
        let limits = limits(config);
        Self {
            #[cfg(feature = "mutations")]
            bug: config.bug,
            pass: config.pass,
            most_bytes: config.hold_bytes,
            mode: config.mode,
            limits,
            seed,
            now: Instant::ZERO,
            gate: Gate::new(config.hold_bytes),
            translator: Translator::new(limits.header, seed),
            counts: Counts::NONE,
            side: Shadowing::new(config.hold_bytes),
        }
    }

    /// This host has the VM, with the guest that ran here since checkpoint `epoch`: what the world
    /// may not have heard of it is said again, client frames are numbered on, and the guest gets
    /// those that were stored for it: their senders may have been told that they arrived.
    pub(crate) fn take_over(mut self, epoch: Epoch) -> Outlet<Serving> {
        let mut backlog = VecDeque::new();
        while let Some(stored) = self.poll_input(self.now) {
            backlog.push_back(stored);
        }
        self.translator.take_over();
        // The bounds are the same and the gate is empty, so that nothing is dropped here.
        for frame in self.side.shadow.take() {
            self.release(frame, &mut News::default());
        }
        let mut outlet = self.serve(epoch);
        outlet.side.backlog = backlog;
        outlet
    }

    /// This host has the VM, with a guest that begins anew.
    pub(crate) fn boot(mut self, epoch: Epoch) -> Outlet<Serving> {
        self.translator.clear();
        self.translator.take_over();
        self.serve(epoch)
    }

    fn serve(self, epoch: Epoch) -> Outlet<Serving> {
        let newest = self.side.stored.newest();
        let side = Serving::new(self.limits, self.seed, epoch, newest);
        self.becomes(side)
    }

    /// Whether a frame that the guest here said after checkpoint `since` is compared by the other
    /// host, and to be [kept](Self::keep); `newest` is the newest loaded.
    pub(crate) fn is_said(
        &self,
        newest: Epoch,
        since: Epoch,
        frame: &Bytes,
    ) -> Result<bool, Misuse> {
        if since > newest {
            return Err(Misuse::WrongEpoch { got: since, newest });
        }
        // What was said before the last commit never happened.
        Ok(since == newest && self.mode == Mode::Lockstep && !passes(self.pass, frame))
    }

    /// Keeps a frame until the world has heard it from the other host.
    pub(crate) fn keep(&mut self, now: Instant, frame: Bytes) -> Option<Queue> {
        self.now = now;
        let frame = self.translator.from_guest(now, frame);
        (!self.side.shadow.push(frame)).then_some(Queue::Shadow)
    }

    /// The first `count` frames since the checkpoint have left the other host.
    pub(crate) fn heard_there(&mut self, count: u64) {
        self.side.shadow.released(count);
    }

    /// Stores a client frame that the other host mirrors; `first` says that the one before it was
    /// not mirrored.
    pub(crate) fn store(&mut self, index: u64, first: bool, frame: Bytes) -> Result<(), PeerFault> {
        if first {
            self.side.stored.begin_anew();
        }
        let (message, field) = (Kind::Input.name(), "index");
        within_reach(message, field, index)?;
        match self.side.stored.push(index, frame) {
            Ok(()) => {
                self.side.unacknowledged = true;
                Ok(())
            }
            Err(NotStored::Gap { expected }) => Err(PeerFault::Field {
                message,
                field,
                got: index,
                expected,
            }),
            Err(NotStored::Full) => Err(PeerFault::OverLimit {
                message,
                field: "bytes since the cut",
                got: index,
                limit: self.most_bytes as u64 * 2,
            }),
        }
    }

    /// Stores what the other host reports of a connection.
    pub(crate) fn report(&mut self, now: Instant, report: Report) {
        self.now = now;
        self.side.reports += 1;
        self.side.unacknowledged = true;
        self.translator.report(now, report);
    }

    /// Stores what the other host knows for good of a connection.
    pub(crate) fn inherit(&mut self, now: Instant, lasting: Lasting) {
        self.translator.inherit(now, lasting);
    }

    /// The newest client frame and the number of reports stored, modulo 2^32, if that was not
    /// acknowledged.
    pub(crate) fn acknowledge(&mut self) -> Option<(u64, u32)> {
        let is_news = core::mem::take(&mut self.side.unacknowledged);
        let newest = self.side.stored.last().unwrap_or(0);
        is_news.then_some((newest, self.side.reports as u32))
    }

    /// The next client frame for the guest here: those it has not been given, and after a commit
    /// those that the loaded state has not consumed.
    pub(crate) fn poll_input(&mut self, now: Instant) -> Option<(u64, Bytes)> {
        if self.mode == Mode::Standby {
            return None;
        }
        self.now = now;
        loop {
            if let Some((_, frame)) = self.translator.poll_ready() {
                // Those that came after it may have been given already.
                return Some((self.side.stored.given(), frame));
            }
            let (index, frame) = self.side.stored.poll()?;
            if let Some(frame) = self.translator.to_guest(now, index, frame) {
                return Some((index, frame));
            }
        }
    }

    /// All memory is about to be replaced: client frames of an earlier guest mean nothing.
    pub(crate) fn begin_anew(&mut self) {
        self.side.stored.clear();
        self.side.reports = 0;
        self.translator.clear();
    }

    /// Checkpoint `epoch` is loaded that consumed client frames up to `inputs`; the next interval
    /// runs in `mode`.
    pub(crate) fn commit(
        &mut self,
        now: Instant,
        epoch: Epoch,
        inputs: u64,
        mode: Mode,
    ) -> Option<Mode> {
        self.now = now;
        self.side.stored.rewind(inputs);
        self.side.shadow.commit();
        self.translator.commit(now, epoch);
        self.set_mode(mode)
    }

    /// The peer is gone: nobody waits for an acknowledgement.
    pub(crate) const fn forget_peer(&mut self) {
        self.side.unacknowledged = false;
    }
}

impl Shadowing {
    const fn new(most_bytes: usize) -> Self {
        Self {
            // The primary bounds what it mirrors between two cuts; one transaction may overlap.
            stored: StoredInputs::new(most_bytes.saturating_mul(2)),
            unacknowledged: false,
            reports: 0,
            shadow: Shadow::new(most_bytes),
        }
    }
}

/// Most divergences that wait to be passed on.
const MOST_PARTED: usize = 64;
/// A frame waits at least so long for its match, however fast others came.
const SOONEST: Duration = Duration::from_millis(10);

const fn limits(config: &Config) -> Limits {
    Limits {
        bytes: config.hold_bytes,
        header: config.pass.header,
        soonest: SOONEST,
        latest: config.compare_timeout,
    }
}

impl Counts {
    const NONE: Self = Self {
        released: 0,
        matched: 0,
        dropped: 0,
        diverged: 0,
        inputs: 0,
    };
}

/// Frames are counted on from what a peer says: it may not bring the count near its end.
pub(crate) const fn within_reach(
    message: &'static str,
    field: &'static str,
    got: u64,
) -> Result<(), PeerFault> {
    let limit = u64::MAX / 2;
    if got <= limit {
        return Ok(());
    }
    Err(PeerFault::OverLimit {
        message,
        field,
        got,
        limit,
    })
}
