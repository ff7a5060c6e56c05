//! The primary: serves the world, decides when to checkpoint, lets nothing out that its secondary
//! could not account for.
//!
//! The file reads in the order of a pairing: inputs, hello, synchronisation, checkpoint, output,
//! commands, the end.

use alloc::{boxed::Box, string::String, vec::Vec};
use bytes::Bytes;

use crate::{
    base::Base,
    command::{Answer, Refusal},
    epoch::{Pace, Round, Sender, Transaction},
    error::{Misuse, PeerFault},
    event::{Cause, Event, PeerLost},
    id::{Channel, Epoch, PageRuns, Role, Slot},
    machine::{
        Body, Captured, Deadline, Demand, GuestDone, GuestOp, GuestOpKind, Input, Machine, Notify,
        Output, ReplicationOp, TimerKind, Transmit,
    },
    member::{BootId, Command as MemberCommand, Local, MemberOutput, Unprotected},
    mutation::bug,
    operator::{Act, Standing, Until, Why},
    output::{News, Outlet, Serving, Shadowing, flow::Report, translate::Lasting},
    pairing::{Accept, FRAMES_STUCK, Item, Unfit},
    protection::Protection,
    ram::CacheMode,
    roles::Conduct,
    stats::Stats,
    status::{ColoMode, ResumePolicy, Status},
    time::Instant,
    wire::{BODY_MOST, FLAG_FIRST, HEAD_LEN, Kind},
};

/// The primary of a pair. See the [crate documentation](crate) for the loop that drives it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Primary {
    pub(crate) base: Base,
    sender: Sender,
    protection: Protection,
    pace: Pace,
    /// Instance of the peer that the member wants synchronised.
    sync_peer: Option<BootId>,
    accept: Accept,
    outlet: Outlet<Serving>,
    /// The VM was taken away; the driver's [`Node`](crate::node::Node) makes this a secondary.
    pub(crate) demoted: bool,
}

impl Primary {
    pub(crate) fn new(base: Base, outlet: Outlet<Serving>) -> Self {
        let config = &base.config;
        Self {
            sender: Sender::new(config),
            protection: Protection::None,
            pace: Pace::new(config.longest, config.shortest, config.adaptive, base.now),
            sync_peer: None,
            accept: Accept::new(config),
            outlet,
            demoted: false,
            base,
        }
    }

    /// A primary from the start: it owns the VM, whose guest has not run yet.
    pub(crate) fn first(base: Base) -> Self {
        let outlet = Outlet::serving(&base.config, base.boot.0, base.epoch, 0);
        Self::new(base, outlet)
    }

    /// Does what the member wants at the start.
    pub(crate) fn start(&mut self) {
        while let Some((index, frame)) = self.outlet.poll_backlog() {
            self.base.push(Output::ToGuest { index, frame });
        }
        self.settle();
    }

    /// After the VM was taken away: what the secondary that this host is now goes on with.
    pub(crate) fn ended(self) -> (Base, Outlet<Shadowing>) {
        let mut base = self.base;
        base.fenced = false;
        // Another guest comes in its place, of which no operator has said anything here.
        base.set_broken(false);
        base.stopped = false;
        (base, self.outlet.give_up())
    }

    // ---- behind another wire ------------------------------------------------------------------

    /// A primary whose secondary another wire's translation has accepted and connected.
    pub(crate) fn accepted(base: Base, secondary: BootId) -> Self {
        let mut primary = Self::first(base);
        primary.sender.set_their_cache(CacheMode::Full);
        primary.base.link.peer = Some(secondary);
        primary.base.link.up_all();
        primary.settle();
        primary
    }

    /// The checkpoint in hand.
    pub(crate) fn transaction(&self) -> Option<Epoch> {
        self.sender.transaction().map(|tx| tx.epoch)
    }

    /// Whether the secondary owes an answer.
    pub(crate) const fn awaits_reply(&self) -> bool {
        self.sender.awaits_reply()
    }

    // ---- first contact ------------------------------------------------------------------------

    fn hello(&mut self, body: &Bytes) -> Result<(), PeerFault> {
        let config = &self.base.config;
        let ours = config.hello(self.base.boot.0, self.base.wanted_mode);
        let settled =
            self.protection == Protection::None && !self.base.fenced && self.base.member.is_alone();
        let theirs = match self.accept.hello(&ours, body, settled) {
            None => return Err(self.sender.out_of_phase(Kind::Hello)),
            Some(Ok(theirs)) => theirs,
            Some(Err(unfit)) => {
                self.base.refuse_peer(unfit.reasons());
                if let Unfit::Faulty(fault, _) = unfit {
                    return Err(fault);
                }
                self.lose_peer(PeerLost::Unfit, None);
                return Ok(());
            }
        };
        self.base.link.peer = Some(BootId(theirs.boot));
        self.base.link.generation = self.base.member.generation();
        self.sender.set_their_cache(theirs.cache);
        let head = self.base.link.head(Kind::Welcome, 0);
        let body = ours.encode();
        self.base.send(Channel::Control, head, &body);
        self.base.event(Event::PeerAccepted { boot: theirs.boot });
        Ok(())
    }

    // ---- first synchronisation ------------------------------------------------------------------

    fn may_synchronise(&self) -> bool {
        self.sender.is_alone()
            && self.protection == Protection::None
            && self.base.link.peer.is_some()
            && (self.base.link.peer == self.sync_peer || self.base.member.is_told())
            && self.base.link.all_up()
            && self.base.guest_ops.idle()
            && !self.base.fenced
    }

    fn begin_sync(&mut self) {
        self.protection = Protection::Syncing;
        self.sender.begin();
        self.base.link.progressed(self.base.now);
        self.base
            .op(GuestOp::Replication(ReplicationOp::Start(Role::Primary)));
        self.base.op(GuestOp::Harvest);
    }

    fn harvested(&mut self) {
        match self.sender.harvested() {
            None => {}
            Some(Round::Last) => self.request(Cause::FirstSync, true),
            Some(Round::Next {
                round,
                pages,
                not_converging,
            }) => {
                if not_converging {
                    let most = self.base.config.last_round_pages;
                    self.base.event(Event::NotConverging { pages, most });
                }
                let sent = 0;
                self.base.event(Event::Synchronising { round, pages, sent });
            }
        }
    }

    fn round_done(&mut self, number: u64) -> Result<(), PeerFault> {
        let (round, pages) = self.sender.round_done(number)?;
        let sent = pages;
        self.base.event(Event::Synchronising { round, pages, sent });
        self.base.op(GuestOp::Harvest);
        Ok(())
    }

    // ---- a checkpoint, step by step -------------------------------------------------------------

    /// CHECKPOINT_REQUEST: the secondary stops; the guest here runs on.
    fn request(&mut self, cause: Cause, first: bool) {
        let epoch = self.base.epoch.next();
        let (mode, now) = (self.base.wanted_mode, self.base.now);
        let tx = Transaction::new(epoch, cause, first, mode, now);
        self.outlet.requested(tx.mode);
        self.base.send_control(Kind::CheckpointRequest, epoch.0);
        self.base.link.progressed(now);
        self.sender.request(tx);
        self.base.local(Local::CheckpointRunning(true));
    }

    /// CHECKPOINT_REPLY: the secondary is stopped. Capture: what is dirty, what it wrote itself,
    /// and what the last live round left.
    fn reply(&mut self, number: u64) -> Result<(), PeerFault> {
        let (epoch, also) = self.sender.reply(self.base.now, number)?;
        let resume = self.base.config.resume == ResumePolicy::AfterCapture && self.may_run();
        let also = if bug!(self.base.config, CaptureWithoutAlso) {
            PageRuns::default()
        } else {
            also
        };
        self.base.op(GuestOp::Capture {
            epoch,
            also,
            resume,
        });
        self.outlet.capturing(epoch);
        Ok(())
    }

    /// VMSTATE_SEND, then pages on every lane and VMSTATE_SIZE with the state on Control.
    fn captured(&mut self, captured: Captured) {
        self.base.epoch = self.base.epoch.max(captured.epoch);
        self.base.stats.longest_pause = self.base.stats.longest_pause.max(captured.pause);
        let Some(tx) = self.sender.captured(self.base.now, &captured) else {
            // Given up meanwhile: the guest runs again by itself.
            return;
        };
        if tx.state_len > self.base.config.state_bytes {
            let why = alloc::format!(
                "device state of {} bytes, limit {}",
                tx.state_len,
                self.base.config.state_bytes
            );
            return self.guest_failed(GuestOpKind::Capture, why);
        }
        let news = self.outlet.captured(tx.epoch);
        self.tell(news);
        self.pace.captured();
        if self.base.awaits_checkpoint_after(tx.epoch) {
            // Asked while this one was being captured, perhaps after the guest had stopped for it.
            self.pace.want(Cause::Asked);
        }
        if tx.first {
            self.hand_on();
        }
        let head = self.base.link.head(Kind::VmstateSend, tx.epoch.0);
        let (head, body) = tx.announcement(head);
        self.base.send(Channel::Control, head, &body);
    }

    /// LASTING_CONNECTIONS: how earlier takeovers translated what is still open.
    fn hand_on(&mut self) {
        let lasting: Vec<Lasting> = self.outlet.lasting().collect();
        for some in lasting.chunks(BODY_MOST / Lasting::BYTES) {
            let body: Vec<u8> = some.iter().flat_map(Lasting::to_bytes).collect();
            let head = self.base.link.head(Kind::Lasting, 0);
            self.base.send(Channel::Control, head, &body);
        }
    }

    /// VMSTATE_RECEIVED: the commit point. What was said before the capture may leave.
    fn received(&mut self, number: u64) -> Result<(), PeerFault> {
        let tx = self.sender.received(self.base.now, number)?;
        let (news, changed) = self
            .outlet
            .commit(self.base.now, tx.epoch, tx.inputs, tx.mode);
        self.tell(news);
        if let Some(mode) = changed {
            self.base.event(Event::ModeChanged(mode));
        }
        self.base.notify(Notify::CompareCheckpoint(tx.epoch));
        self.base.local(Local::Applied(tx.epoch));
        Ok(())
    }

    /// VMSTATE_LOADED, or CHECKPOINT_READY for the first one: the secondary runs (lockstep) or
    /// waits (standby) with the new state.
    fn loaded(&mut self, number: u64, kind: Kind) -> Result<(), PeerFault> {
        let tx = self.sender.loaded(self.base.now, number, kind)?;
        self.outlet.resumed(self.base.now);
        self.base.local(Local::CheckpointRunning(false));
        let event = tx.completed(&mut self.base.stats);
        self.base.event(event);
        if self.base.wanted_mode == tx.mode {
            self.base.wanted_mode = self.pace.ended(tx.mode, tx.cause);
        } else {
            self.pace.want(Cause::Asked);
        }
        self.base.answer_checkpoint(tx.epoch, Answer::Done);
        if tx.first
            && let Some(boot) = self.base.link.peer
        {
            self.protection = Protection::Arming(self.base.now);
            self.base.local(Local::ReplicaReady {
                boot,
                epoch: tx.epoch,
                evidence_clean: true,
            });
        }
        Ok(())
    }

    /// The member holds a lease from the secondary: from here on either host may fail.
    fn armed(&mut self) {
        self.protection = Protection::Armed;
        self.pace.begin(self.base.now);
        self.base.failover.enter(ColoMode::Primary);
        let (mode, epoch) = (self.outlet.mode(), self.base.epoch);
        self.base.event(Event::Protected { mode, epoch });
    }

    // ---- output and input -------------------------------------------------------------------------

    /// Passes on what the outlet has to say.
    fn tell(&mut self, news: News) {
        while !self.base.link.net_is_full(HEAD_LEN + Report::BYTES)
            && let Some(report) = self.outlet.poll_report()
        {
            let head = self.base.link.head(Kind::Connection, report.epoch.0);
            self.base.send(Channel::Net, head, &report.to_bytes());
        }
        while let Some(parted) = self.outlet.poll_parted() {
            self.base.event(Event::Parted(Box::new(parted)));
        }
        if let Some(cause) = self.base.pass_on(news) {
            self.pace.want(cause);
        }
    }

    /// Gives a client's frame to the guest here, and while the pair runs in lockstep to the other.
    fn give(&mut self, frame: Bytes) {
        let room = !self.base.link.net_is_full(HEAD_LEN + frame.len());
        let (logged, news) = match self.outlet.number(frame.len(), room) {
            Ok(heard) => heard,
            Err(news) => return self.tell(news),
        };
        if self.outlet.mirrors() {
            let mut head = self.base.link.head(Kind::Input, logged.index);
            head.flags = if logged.first { FLAG_FIRST } else { 0 };
            self.base.send(Channel::Net, head, &frame);
        }
        self.tell(news);
        let index = logged.index;
        self.base.push(Output::ToGuest { index, frame });
    }

    /// A frame that waits too long for its match asks for a checkpoint.
    fn watch_compare(&mut self) {
        let at = self.outlet.unmatched_at();
        if at.is_some_and(|at| at <= self.base.now) {
            let news = self.outlet.watch(self.base.now);
            self.tell(news);
        }
    }

    // ---- the guest --------------------------------------------------------------------------------

    fn guest_failed(&mut self, op: GuestOpKind, why: String) {
        self.base.event(Event::GuestFailed { op, why });
        if op == GuestOpKind::Pause {
            self.base.refuse_stop();
        }
        if op == GuestOpKind::Resume {
            // The guest cannot run here, until an operator says `cont`. A secondary that could run
            // it is kept, and offered the VM.
            return self.base.set_broken(true);
        }
        self.lose_peer(PeerLost::Local(op), Some("the primary's guest side failed"));
    }

    /// Whether the guest should run now, apart from QEMU's order of a checkpoint.
    const fn may_run(&self) -> bool {
        !self.base.stopped && !self.base.broken && !self.base.fenced && !self.demoted
    }

    fn should_run(&self) -> bool {
        let ordered = self.base.config.resume == ResumePolicy::AfterLoad
            && self.sender.stopped_until_loaded();
        self.may_run() && !ordered
    }

    // ---- the end of a pairing ----------------------------------------------------------------------

    /// Nobody else can own the VM now: everything that was held may leave.
    fn alone(&mut self, failover: bool) {
        self.protection.end();
        let news = self.outlet.open(self.base.epoch);
        self.tell(news);
        self.base.stop_replication(failover);
        self.base.leave_colo(true);
        let generation = self.base.member.generation();
        self.base.event(Event::Unprotected(generation));
        self.base.answer_waiting(Until::Alone, Answer::Done);
        // Only now: a command that was refused or given up leaves the pair as it was.
        if self.base.waits(Until::Left) {
            self.accept.set_detached(true);
            self.base.answer_waiting(Until::Left, Answer::Done);
        }
        let kept = Answer::Refused(Refusal::PeerLost);
        self.base.answer_waiting(Until::HandedOver, kept);
    }

    /// The other host owns the VM.
    fn demote(&mut self) {
        if self.protection.end() != Protection::None {
            self.base.stop_replication(false);
        }
        self.lose_peer(PeerLost::NotOwner, Some("this host lost the VM"));
        // What was asked for did not happen.
        self.base.failover.withdraw();
        self.base.leave_colo(false);
        self.base.answer_waiting(Until::HandedOver, Answer::Done);
        let lost = Answer::Refused(Refusal::NotOwner);
        self.base.answer_waiting(Until::Alone, lost);
        self.base.answer_waiting(Until::Left, lost);
        self.base.notify(Notify::Shadows);
        self.demoted = true;
    }
}

impl Conduct for Primary {
    fn base(&self) -> &Base {
        &self.base
    }

    fn base_mut(&mut self) -> &mut Base {
        &mut self.base
    }

    fn is_over(&self) -> bool {
        self.demoted
    }

    fn dirty(&mut self, _: GuestOpKind, slot: Slot, words: &[u64]) {
        self.sender.dirty(slot, words);
    }

    fn channel_up(&mut self, channel: Channel) -> Result<(), Misuse> {
        let busy = self.base.link.is_up(channel) || !self.sender.is_alone();
        if busy {
            // The driver lets one connection a channel in; a second one means the first is dead.
            self.lose_peer(PeerLost::HungUp(channel), None);
        }
        self.base.link.up(channel)?;
        match channel {
            Channel::Control => {
                self.accept.connected(self.base.now);
                self.base.link.peer = None;
            }
            _ if self.base.link.peer.is_none() => {
                self.base.link.down(channel)?;
                self.base.push(Output::HangUp(channel));
            }
            _ => {}
        }
        Ok(())
    }

    fn channel_down(&mut self, channel: Channel, was_up: bool) {
        if was_up {
            self.lose_peer(PeerLost::HungUp(channel), None);
        }
    }

    fn contact(&mut self, item: &Item) -> Option<Result<(), PeerFault>> {
        match item {
            Item::Message(head, body) if head.kind == Kind::Hello => Some(self.hello(body)),
            _ => None,
        }
    }

    fn item(&mut self, _: Channel, item: Item) -> Result<(), PeerFault> {
        match item {
            Item::Message(head, body) => match head.kind {
                Kind::RoundDone => self.round_done(head.number),
                Kind::OwnDirty => self.sender.own_dirty(&body),
                Kind::CheckpointReply => self.reply(head.number),
                Kind::VmstateReceived => self.received(head.number),
                Kind::VmstateLoaded | Kind::CheckpointReady => self.loaded(head.number, head.kind),
                Kind::InputAck => {
                    let news = self.outlet.acknowledged(head.number, head.count)?;
                    self.tell(news);
                    Ok(())
                }
                kind => Err(self.sender.out_of_phase(kind)),
            },
            Item::Frame(head, frame) if head.kind == Kind::Output => {
                let (newest, epoch) = (self.base.epoch, Epoch(head.number));
                let now = self.base.now;
                let news = self.outlet.said_there(now, newest, epoch, frame)?;
                self.tell(news);
                Ok(())
            }
            // Nothing is ever placed on a primary.
            Item::Frame(head, _) | Item::Contents(head) | Item::Placed(head) => {
                Err(self.sender.out_of_phase(head.kind))
            }
        }
    }

    fn frame_from_guest(&mut self, since: Epoch, frame: Bytes) -> Result<(), Misuse> {
        // A guest that a capture resumes may be heard before the capture is reported, given up or not.
        let captures = self.base.guest_ops.captures().unwrap_or_default();
        let newest = self.base.epoch.max(captures);
        let news = self.outlet.said(self.base.now, newest, since, frame)?;
        self.tell(news);
        while let Some(frame) = self.outlet.poll_heard() {
            self.give(frame);
        }
        Ok(())
    }

    /// A client's frame.
    fn frame_from_world(&mut self, frame: Bytes) {
        if let Some(frame) = self.outlet.heard(self.base.now, frame) {
            self.give(frame);
        }
    }

    fn guest_done(&mut self, done: GuestDone) {
        match done {
            GuestDone::Harvested => self.harvested(),
            GuestDone::Captured(captured) => self.captured(captured),
            GuestDone::Resumed => self.base.set_broken(false),
            GuestDone::Failed { op, why } => self.guest_failed(op, why),
            _ => {}
        }
    }

    fn member_output(&mut self, output: MemberOutput) {
        match output {
            MemberOutput::DropReplication => {
                if matches!(self.protection, Protection::Arming(_) | Protection::Armed) {
                    self.protection = Protection::Severed;
                    self.lose_peer(PeerLost::Silent, Some("the primary goes on alone"));
                }
                if self.protection == Protection::Severed {
                    self.alone(true);
                }
            }
            MemberOutput::StartSync { peer } => self.sync_peer = Some(peer),
            MemberOutput::DiscardVm => self.demote(),
            MemberOutput::PauseVm => self.outlet.fence(),
            MemberOutput::Announce => self.outlet.announce(self.base.now),
            _ => {}
        }
    }

    fn standing(&self) -> Standing {
        let newest = self.sender.captured_already().unwrap_or(self.base.epoch);
        Standing {
            protection: self.protection,
            next: newest.next(),
            ..self.base.standing(Role::Primary)
        }
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Checkpoint => self.pace.want(Cause::Asked),
            Act::FailOver { in_pair } => {
                if in_pair {
                    self.base.begin_failover();
                }
                self.base.local(Local::Operator(MemberCommand::FailOver));
            }
            Act::HandOver => self.base.local(Local::Operator(MemberCommand::Yield)),
            Act::Leave(why) => {
                self.accept.set_detached(true);
                let said = match why {
                    Why::Detached => Some("detached by an operator"),
                    Why::Ends if self.protection == Protection::None => Some("the VM ends"),
                    Why::Ends => {
                        self.base.send_control(Kind::Goodbye, 0);
                        None
                    }
                };
                self.lose_peer(PeerLost::Asked, said);
            }
            Act::Detach(why) => {
                if why == Why::Ends {
                    self.base.send_control(Kind::Goodbye, 0);
                }
                self.base.local(Local::Operator(MemberCommand::Detach));
            }
            Act::Attach => self.accept.set_detached(false),
            Act::Override => {
                self.base.local(Local::Operator(MemberCommand::Override));
                if self.base.member.is_alone() {
                    self.base.answer_waiting(Until::Alone, Answer::Done);
                }
            }
            Act::Delay(delay) => self.pace.set_longest(delay),
            Act::Mode(mode) => {
                self.base.wanted_mode = mode;
                if self.protection == Protection::Armed && mode != self.outlet.mode() {
                    self.pace.want(Cause::Asked);
                }
            }
            Act::Stop => {
                self.base.stopped = true;
                self.base.answer_stopped();
            }
            Act::Continue => {
                self.base.stopped = false;
                let opposite = Answer::Refused(Refusal::Countermanded);
                self.base.answer_waiting(Until::Stopped, opposite);
                self.base.set_broken(false);
            }
        }
    }

    fn advance(&mut self) -> bool {
        let now = self.base.now;
        if let Some(why) = self.accept.late(now) {
            self.lose_peer(why, Some("no hello in time"));
            return true;
        }
        if self.sender.awaits()
            && let Some(why) = self.base.stalled(self.sender.name())
        {
            self.lose_peer(why, Some("no progress"));
            return true;
        }
        if let Some(why) = self.base.link.frames_stuck(now) {
            self.lose_peer(why, Some(FRAMES_STUCK));
            return true;
        }
        if matches!(self.protection, Protection::Arming(_)) && self.base.member.is_paired() {
            self.armed();
            return true;
        }
        if let Some(why) = self.protection.late(now, self.base.config.stall) {
            self.lose_peer(why, Some("ownership could not be arranged in time"));
            return true;
        }
        if matches!(self.protection, Protection::Severed) && self.base.member.is_alone() {
            self.alone(true);
            return true;
        }
        if self.may_synchronise() {
            self.begin_sync();
            return true;
        }
        if self.sender.is_between() && self.protection == Protection::Armed {
            self.watch_compare();
            if self.base.guest_ops.idle() && now >= self.pace.due() {
                let cause = self.pace.begin(now);
                self.request(cause, false);
                return true;
            }
        }
        false
    }

    /// The peer is of no use any more. The guest here runs on; what it said stays held until
    /// nobody else can own the VM.
    fn lose_peer(&mut self, why: PeerLost, said: Option<&str>) {
        let had_peer = self.base.link.any_up() || !self.sender.is_alone();
        let aborted = self.sender.abandon();
        self.accept.forget_peer();
        self.base.stats.aborted += u64::from(aborted);
        if let Some(said) = said {
            self.base.send_leave(said);
        }
        self.base.hang_up();
        self.base.guest_ops.forget_queued();
        self.outlet.forget_peer();
        if had_peer {
            self.base.event(Event::PeerLeft(why));
        }
        let gone = Answer::Refused(Refusal::PeerLost);
        self.base.answer_checkpoint(Epoch(u64::MAX), gone);
        if aborted {
            self.base.local(Local::CheckpointRunning(false));
        }
        let syncing = self.protection == Protection::Syncing;
        if let Some(told) = self.protection.sever() {
            self.base.local(told);
        }
        if syncing && self.base.member.is_alone() {
            self.alone(false);
        }
    }
}

impl Machine for Primary {
    fn channels(&self) -> Vec<Channel> {
        self.base.config.channels().collect()
    }

    fn handle_input(&mut self, now: Instant, input: Input<'_>) -> Result<(), Misuse> {
        self.handle(now, input)?;
        self.settle();
        Ok(())
    }

    fn poll_output(&mut self) -> Option<Output> {
        let should_run = self.should_run();
        let first = self.base.poll_output(should_run);
        first.or_else(|| self.outlet.poll(self.base.now, self.base.permit()))
    }

    fn poll_transmit(&mut self, channel: Channel, budget: usize) -> Option<Transmit> {
        if let Some(transmit) = self.base.link.poll_queued(channel, budget) {
            return Some(transmit);
        }
        if !self.base.link.is_up(channel) {
            return None;
        }
        let (now, generation) = (self.base.now, self.base.link.generation);
        let transmit = self.sender.poll(now, generation, channel, budget)?;
        if let Body::Live(runs) = &transmit.body {
            self.base.stats.sync_pages += runs.pages();
        }
        self.base.link.progressed(now);
        self.base.link.handed_out(channel, &transmit);
        Some(transmit)
    }

    fn poll_demand(&mut self, channel: Channel) -> Demand {
        self.base.link.demand(channel)
    }

    fn poll_timeout(&self) -> Option<Deadline> {
        let base = &self.base;
        let greeting = self.accept.deadline();
        let running = self.sender.is_between() && self.protection == Protection::Armed;
        let epoch = (running && base.guest_ops.idle()).then(|| Deadline {
            at: self.pace.due(),
            why: TimerKind::Epoch,
        });
        let unmatched = running.then(|| self.outlet.unmatched_at()).flatten();
        let compare = unmatched.map(|at| Deadline {
            at,
            why: TimerKind::Compare,
        });
        let stall = self.sender.awaits().then(|| base.link.stall());
        let arming = self.protection.deadline(base.config.stall);
        let guest = base.guest_ops.deadline(self.should_run());
        let announce = self.outlet.announcement();
        base.soonest([greeting, epoch, compare, stall, arming, guest, announce])
    }

    fn stats(&self) -> Stats {
        self.outlet.count(self.base.stats)
    }

    fn status(&self) -> Status {
        let armed = self.protection == Protection::Armed;
        let unprotected = self.base.member.unprotected(self.base.now);
        let unpaired = Unprotected::Unpaired(self.base.member.state());
        Status {
            role: Role::Primary,
            protected: armed && unprotected.is_none(),
            unprotected: unprotected.or_else(|| (!armed).then_some(unpaired)),
            phase: self.protection.name().unwrap_or_else(|| self.sender.name()),
            mode: self.outlet.mode(),
            checkpoint_delay: self.pace.longest(),
            replica_valid: true,
            ..self.base.status()
        }
    }
}
