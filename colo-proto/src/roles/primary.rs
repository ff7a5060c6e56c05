//! The primary: serves the world, decides when to checkpoint, lets nothing out that its secondary
//! could not account for.
//!
//! The file reads in the order of a pairing: inputs, hello, synchronisation, checkpoint, output,
//! commands, the end.

use alloc::string::String;
use bytes::Bytes;
use core::time::Duration;

use crate::{
    base::{Base, FRAMES_STUCK, Until},
    command::{Answer, Command, CommandId, Refusal},
    epoch::{Pace, Round, Sender, Transaction},
    error::{Misuse, PeerFault},
    event::{Cause, Event, PeerLost},
    id::{Channel, Epoch, PageRuns, Role},
    machine::{
        Body, Captured, Deadline, Demand, GuestDone, GuestOp, GuestOpKind, Input, Machine, Notify,
        Output, ReplicationOp, TimerKind, Transmit,
    },
    member::{BootId, Command as MemberCommand, Local, MemberOutput, Unprotected},
    mutation::bug,
    output::{News, Outlet, Serving, Shadowing},
    pairing::link::Item,
    ram::CacheMode,
    stats::{CheckpointTimes, Stats},
    status::{ColoMode, FailoverStatus, Mode, ResumePolicy, Status},
    time::Instant,
    wire::{FLAG_FIRST, HEAD_LEN, Hello, Kind, VmstateSend, decode_reasons},
};

/// What stands between this host's guest and a failure of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Protection {
    /// Nothing.
    None,
    /// A secondary is being synchronised.
    Syncing,
    /// It holds a whole state; since then ownership is being arranged. Output is held meanwhile.
    Arming(Instant),
    /// It would take over.
    Armed,
    /// It is gone, and until ownership is settled it might take over: output stays held.
    Severed,
}

/// The primary of a pair. See the [crate documentation](crate) for the loop that drives it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Primary {
    pub(crate) base: Base,
    sender: Sender,
    protection: Protection,
    pace: Pace,
    /// Instance of the peer that the member wants synchronised.
    sync_peer: Option<BootId>,
    /// A peer that connected and has not said hello since then.
    greeting: Option<Instant>,
    outlet: Outlet<Serving>,
    detached: bool,
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
            greeting: None,
            outlet,
            detached: false,
            demoted: false,
            base,
        }
    }

    /// A primary from the start: it owns the VM, whose guest has not run yet.
    pub(crate) fn first(base: Base) -> Self {
        let outlet = Outlet::serving(&base.config, base.epoch, 0);
        Self::new(base, outlet)
    }

    /// Does what the member wants at the start.
    pub(crate) fn start(&mut self) {
        self.pump();
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

    // ---- inputs -------------------------------------------------------------------------------

    fn handle(&mut self, now: Instant, input: Input<'_>) -> Result<(), Misuse> {
        let Some(input) = self.base.handle_common(now, input)? else {
            return Ok(());
        };
        match input {
            Input::Up(channel) => self.channel_up(channel)?,
            Input::Down(channel) => {
                let was_up = self.base.link.is_up(channel);
                self.base.disconnected(channel)?;
                if was_up {
                    self.lose_peer(PeerLost::HungUp(channel), None);
                }
            }
            Input::Bytes(channel, bytes) => match self.base.link.bytes(channel, bytes)? {
                Ok(None) => {}
                Ok(Some(item)) => self.item(channel, item),
                Err(fault) => self.fault(fault),
            },
            Input::Placed(channel, n) => {
                let item = self.base.link.placed(channel, n)?;
                self.item(channel, item);
            }
            Input::Frame(channel, frame) => {
                let item = self.base.link.frame(channel, frame)?;
                self.item(channel, item);
            }
            Input::FromGuest { epoch, frame } => self.frame_from_guest(epoch, frame)?,
            Input::FromWorld(frame) => self.frame_from_world(frame),
            Input::Dirty(slot, words) => {
                self.base.check_slot(slot)?;
                match self.base.guest_ops.busy() {
                    Some(GuestOpKind::Harvest | GuestOpKind::Capture) => {
                        self.sender.dirty(slot, words);
                    }
                    busy => {
                        return Err(Misuse::UnexpectedDone {
                            got: "dirty words",
                            expected: busy.map_or("nothing", GuestOpKind::name),
                        });
                    }
                }
            }
            Input::Guest(done) => {
                match self.base.guest_ops.done(&done)? {
                    Some(id) => self.base.operated(id, done),
                    None => self.guest_done(done),
                }
                self.base.answer_stopped();
            }
            Input::Command(id, command) => self.command(id, command),
            _ => {}
        }
        Ok(())
    }

    /// Lets everything that became possible happen: member decisions, then phases, then timers.
    fn pump(&mut self) {
        loop {
            while let Some(output) = self.base.member.poll_output() {
                if let Some(output) = self.base.member_output(output) {
                    self.member_output(output);
                }
                if self.demoted {
                    return;
                }
            }
            if !self.advance() {
                return;
            }
        }
    }

    /// One step that needs no further input. False if there is none.
    fn advance(&mut self) -> bool {
        let now = self.base.now;
        if self
            .greeting
            .is_some_and(|since| now.since(since) >= self.base.config.handshake)
        {
            self.lose_peer(
                PeerLost::TooSlow(self.base.config.handshake),
                Some("no hello in time"),
            );
            return true;
        }
        if self.sender.awaits()
            && let Some(why) = self.base.stalled(self.sender.name())
        {
            self.lose_peer(why, Some("no progress"));
            return true;
        }
        if let Some(why) = self.base.frames_stuck() {
            self.lose_peer(why, Some(FRAMES_STUCK));
            return true;
        }
        if let Protection::Arming(since) = self.protection {
            if self.base.member.is_paired() {
                self.armed();
                return true;
            }
            // An arbiter that never answers must not hold output for ever, however much the peer
            // has to say meanwhile.
            let patience = self.base.config.stall;
            if now.since(since) >= patience {
                self.lose_peer(
                    PeerLost::TooSlow(patience),
                    Some("ownership could not be arranged in time"),
                );
                return true;
            }
        }
        if matches!(self.protection, Protection::Severed) && self.base.member.is_alone() {
            self.alone();
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

    fn item(&mut self, channel: Channel, item: Item) {
        self.base.moved(channel);
        let result = match item {
            Item::Message(head, body) => match head.kind {
                Kind::Hello => self.hello(&body),
                Kind::Leave => {
                    let said = decode_reasons(&body).into_iter().next().unwrap_or_default();
                    self.lose_peer(PeerLost::Told(said), None);
                    return;
                }
                Kind::Refuse => {
                    let reasons = decode_reasons(&body);
                    self.base.event(Event::PeerRefused { reasons });
                    self.lose_peer(PeerLost::Unfit, None);
                    return;
                }
                _ => self
                    .base
                    .check_generation(&head)
                    .and_then(|()| match head.kind {
                        Kind::RoundDone => self.round_done(head.number),
                        Kind::OwnDirty => self.sender.own_dirty(&body),
                        Kind::CheckpointReply => self.reply(head.number),
                        Kind::VmstateReceived => self.received(head.number),
                        Kind::VmstateLoaded | Kind::CheckpointReady => {
                            self.loaded(head.number, head.kind)
                        }
                        Kind::InputAck => {
                            let news = self.outlet.acknowledged(head.number)?;
                            self.tell(news);
                            Ok(())
                        }
                        _ => Err(self.sender.out_of_phase(head.kind)),
                    }),
            },
            Item::Frame(head, frame) => self.base.check_generation(&head).and_then(|()| {
                if head.kind == Kind::Output {
                    let (newest, epoch) = (self.base.epoch, Epoch(head.number));
                    let news = self.outlet.said_there(newest, epoch, frame)?;
                    self.tell(news);
                    Ok(())
                } else {
                    Err(self.sender.out_of_phase(head.kind))
                }
            }),
            // Nothing is ever placed on a primary.
            Item::Contents(head) | Item::Placed(head) => Err(self.sender.out_of_phase(head.kind)),
        };
        if let Err(fault) = result {
            self.fault(fault);
        }
    }

    fn fault(&mut self, fault: PeerFault) {
        let said = alloc::format!("{fault}");
        self.lose_peer(PeerLost::Faulty(fault), Some(&said));
    }

    // ---- behind another wire ------------------------------------------------------------------

    /// A primary whose secondary another wire's translation has accepted and connected.
    pub(crate) fn accepted(base: Base, secondary: BootId) -> Self {
        let mut primary = Self::first(base);
        primary.sender.set_their_cache(CacheMode::Full);
        primary.base.peer = Some(secondary);
        primary.base.link.up_all();
        primary.pump();
        primary
    }

    /// Takes what a translation made of another wire's bytes.
    pub(crate) fn handle_item(&mut self, now: Instant, channel: Channel, item: Item) {
        self.base.now = self.base.now.max(now);
        self.item(channel, item);
        self.pump();
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

    fn channel_up(&mut self, channel: Channel) -> Result<(), Misuse> {
        let busy = self.base.link.is_up(channel) || !self.sender.is_alone();
        if busy {
            // The driver lets one connection a channel in; a second one means the first is dead.
            self.lose_peer(PeerLost::HungUp(channel), None);
        }
        self.base.connected(channel)?;
        match channel {
            Channel::Control => {
                self.greeting = Some(self.base.now);
                self.base.peer = None;
            }
            _ if self.base.peer.is_none() => {
                self.base.link.down(channel)?;
                self.base.push(Output::HangUp(channel));
            }
            _ => {}
        }
        Ok(())
    }

    fn hello(&mut self, body: &Bytes) -> Result<(), PeerFault> {
        if self.greeting.take().is_none() {
            return Err(self.sender.out_of_phase(Kind::Hello));
        }
        let ours = self
            .base
            .config
            .hello(self.base.boot.0, self.base.wanted_mode);
        let theirs = match Hello::decode(Kind::Hello.name(), body) {
            Ok(theirs) => theirs,
            Err(error) => {
                self.base
                    .refuse_peer(alloc::vec![alloc::format!("{error}")]);
                return Err(PeerFault::Decode {
                    channel: Channel::Control,
                    error,
                });
            }
        };
        let mut reasons = ours.differences(&theirs);
        if self.detached {
            reasons.push(String::from(
                "an operator detached the pair here; attach it first",
            ));
        }
        if self.protection != Protection::None || self.base.fenced || !self.base.member.is_alone() {
            reasons.push(String::from("ownership is not settled here yet; try again"));
        }
        if !reasons.is_empty() {
            self.base.refuse_peer(reasons);
            self.lose_peer(PeerLost::Unfit, None);
            return Ok(());
        }
        self.base.peer = Some(BootId(theirs.boot));
        self.base.pairing = self.base.member.generation();
        self.sender.set_their_cache(theirs.cache);
        let head = self.base.head(Kind::Welcome, 0);
        let body = ours.encode();
        self.base.send(Channel::Control, head, &body);
        self.base.event(Event::PeerAccepted { boot: theirs.boot });
        Ok(())
    }

    // ---- first synchronisation ------------------------------------------------------------------

    fn may_synchronise(&self) -> bool {
        self.sender.is_alone()
            && self.protection == Protection::None
            && self.base.peer.is_some()
            && (self.base.peer == self.sync_peer || self.base.member.is_told())
            && self.base.link.all_up()
            && self.base.guest_ops.idle()
            && !self.base.fenced
    }

    fn begin_sync(&mut self) {
        self.protection = Protection::Syncing;
        self.sender.begin();
        self.base.progress = self.base.now;
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
        let tx = Transaction {
            epoch,
            cause,
            first,
            mode: self.base.wanted_mode,
            pages: 0,
            inputs: 0,
            state_len: 0,
            since: self.base.now,
            times: CheckpointTimes::default(),
        };
        self.outlet.requested(tx.mode);
        self.base.send_control(Kind::CheckpointRequest, epoch.0);
        self.base.progress = self.base.now;
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
        let body = VmstateSend {
            inputs: tx.inputs,
            pages: tx.pages,
        }
        .encode();
        let mut head = self.base.head(Kind::VmstateSend, tx.epoch.0);
        head.arg = u32::from(tx.mode == Mode::Lockstep);
        self.base.send(Channel::Control, head, &body);
    }

    /// VMSTATE_RECEIVED: the commit point. What was said before the capture may leave.
    fn received(&mut self, number: u64) -> Result<(), PeerFault> {
        let tx = self.sender.received(self.base.now, number)?;
        let (news, changed) = self.outlet.commit(tx.epoch, tx.inputs, tx.mode);
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
        self.base.local(Local::CheckpointRunning(false));
        let stats = &mut self.base.stats;
        stats.checkpoints += 1;
        stats.pages += tx.pages;
        stats.state_bytes += tx.state_len;
        stats.last = tx.times;
        self.base.event(Event::Checkpointed {
            epoch: tx.epoch,
            why: tx.cause,
            pages: tx.pages,
            times: tx.times,
        });
        if self.base.wanted_mode == tx.mode {
            self.base.wanted_mode = self.pace.ended(tx.mode, tx.cause);
        } else {
            self.pace.want(Cause::Asked);
        }
        self.base.answer_checkpoint(tx.epoch, Answer::Done);
        if tx.first
            && let Some(boot) = self.base.peer
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

    fn frame_from_guest(&mut self, since: Epoch, frame: Bytes) -> Result<(), Misuse> {
        // A guest that a capture resumes may be heard before the capture is reported, given up or not.
        let captures = self.base.guest_ops.captures().unwrap_or_default();
        let newest = self.base.epoch.max(captures);
        let news = self.outlet.said(self.base.now, newest, since, frame)?;
        self.tell(news);
        Ok(())
    }

    /// A client's frame: for the guest here, and while the pair runs in lockstep for the other.
    fn frame_from_world(&mut self, frame: Bytes) {
        let room = !self.base.net_is_full(HEAD_LEN + frame.len());
        let (logged, news) = match self.outlet.heard(frame.len(), room) {
            Ok(heard) => heard,
            Err(news) => return self.tell(news),
        };
        if self.outlet.mirrors() {
            let mut head = self.base.head(Kind::Input, logged.index);
            head.flags = if logged.first { FLAG_FIRST } else { 0 };
            self.base.send(Channel::Net, head, &frame);
        }
        self.tell(news);
        let index = logged.index;
        self.base.push(Output::ToGuest { index, frame });
    }

    /// Passes on what the outlet has to say.
    fn tell(&mut self, news: News) {
        if let Some(queue) = news.full {
            self.base.event(Event::QueueFull(queue));
        }
        // The count is a total: one that is left out is made good by the next.
        if let Some((epoch, left)) = news.left
            && !self.base.net_is_full(HEAD_LEN)
        {
            let mut head = self.base.head(Kind::Released, epoch.0);
            head.count = u32::try_from(left).unwrap_or(u32::MAX);
            self.base.send(Channel::Net, head, &[]);
        }
        if let Some(cause) = news.wants {
            self.pace.want(cause);
        }
    }

    /// A frame that waits too long for its match asks for a checkpoint, once.
    fn watch_compare(&mut self) {
        let timeout = self.base.config.compare_timeout;
        let since = self.outlet.unmatched_since();
        if since.is_some_and(|at| self.base.now.since(at) >= timeout) {
            self.outlet.noticed_unmatched();
            self.pace.want(Cause::Unanswered);
        }
    }

    // ---- the guest --------------------------------------------------------------------------------

    fn guest_done(&mut self, done: GuestDone) {
        self.base.progress = self.base.now;
        match done {
            GuestDone::Harvested => self.harvested(),
            GuestDone::Captured(captured) => self.captured(captured),
            GuestDone::Resumed => self.base.set_broken(false),
            GuestDone::Failed { op, why } => self.guest_failed(op, why),
            _ => {}
        }
    }

    fn guest_failed(&mut self, op: GuestOpKind, why: String) {
        self.base.event(Event::GuestFailed { op, why });
        if op == GuestOpKind::Pause {
            self.base
                .answer_waiting(Until::Stopped, Answer::Refused(Refusal::GuestFailed));
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

    // ---- commands ---------------------------------------------------------------------------------

    fn command(&mut self, id: CommandId, command: Command) {
        let armed = self.protection == Protection::Armed;
        match command {
            Command::CheckpointNow if !armed => self.base.refuse(id, Refusal::NotProtected),
            Command::CheckpointNow => {
                self.pace.want(Cause::Asked);
                let newest = self.sender.captured_already().unwrap_or(self.base.epoch);
                let least = newest.next();
                self.base.wait(id, Until::Checkpoint(least));
            }
            Command::LostHeartbeat if self.base.failover.mode == ColoMode::None => {
                if self.protection != Protection::Severed {
                    return self.base.refuse(id, Refusal::NotProtected);
                }
                // Lost before it was protection, and perhaps whole all the same.
                self.base.wait(id, Until::Alone);
                self.base.local(Local::Operator(MemberCommand::FailOver));
            }
            Command::LostHeartbeat => {
                if !self.base.failover.request() {
                    return self.base.refuse(id, Refusal::FailoverInProgress);
                }
                self.base.event(Event::Failover(FailoverStatus::Require));
                self.base.wait(id, Until::Alone);
                self.base.local(Local::Operator(MemberCommand::FailOver));
            }
            Command::FailOver if !armed => self.base.refuse(id, Refusal::NotProtected),
            Command::FailOver if self.base.waits(Until::HandedOver) => {
                self.base.refuse(id, Refusal::InProgress);
            }
            // The other host would run it.
            Command::FailOver if self.base.stopped => self.base.refuse(id, Refusal::Stopped),
            // QEMU's dialect has no word for it.
            Command::FailOver if self.base.member.is_told() => {
                let state = self.base.member.state();
                self.base.refuse(id, Refusal::Ownership(state));
            }
            Command::FailOver => {
                self.base.wait(id, Until::HandedOver);
                self.base.local(Local::Operator(MemberCommand::Yield));
            }
            Command::Detach => {
                self.detached = true;
                match self.protection {
                    Protection::None => {
                        self.lose_peer(PeerLost::Asked, Some("detached by an operator"));
                        self.base.answer(id, Answer::Done);
                    }
                    Protection::Syncing => {
                        self.base.wait(id, Until::Alone);
                        self.lose_peer(PeerLost::Asked, Some("detached by an operator"));
                    }
                    Protection::Arming(_) | Protection::Armed | Protection::Severed => {
                        self.base.wait(id, Until::Alone);
                        self.base.local(Local::Operator(MemberCommand::Detach));
                    }
                }
            }
            Command::Override => {
                self.base.wait(id, Until::Alone);
                self.base.local(Local::Operator(MemberCommand::Override));
                if self.base.member.is_alone() {
                    self.base.answer_waiting(Until::Alone, Answer::Done);
                }
            }
            Command::Attach => {
                self.detached = false;
                self.base.answer(id, Answer::Done);
            }
            Command::CheckpointDelay(delay) => {
                let bounds = Duration::from_millis(1)..=Duration::from_secs(3600);
                if !bounds.contains(&delay) {
                    return self.base.refuse(
                        id,
                        Refusal::Range {
                            key: "x-checkpoint-delay",
                            expected: "1 ms to 1 h",
                        },
                    );
                }
                self.pace.set_longest(delay);
                self.base.answer(id, Answer::Done);
            }
            Command::SetMode(mode) => {
                self.base.wanted_mode = mode;
                if armed && mode != self.outlet.mode() {
                    self.pace.want(Cause::Asked);
                }
                self.base.answer(id, Answer::Done);
            }
            Command::Stop => {
                self.base.stopped = true;
                self.base.wait(id, Until::Stopped);
                self.base.answer_stopped();
            }
            Command::Continue => {
                self.base.stopped = false;
                self.base
                    .answer_waiting(Until::Stopped, Answer::Refused(Refusal::Countermanded));
                self.base.set_broken(false);
                self.base.answer(id, Answer::Done);
            }
            Command::XenSetReplication {
                enable,
                role,
                failover,
            } => self.base.xen_set_replication(id, enable, role, failover),
            Command::XenDoCheckpoint => {
                self.base.replicate(id, ReplicationOp::Checkpoint);
                self.base.notify(Notify::FilterCheckpoint(self.base.epoch));
            }
            Command::Shutdown => {
                if self.protection == Protection::None {
                    self.lose_peer(PeerLost::Asked, Some("the VM ends"));
                    return self.base.answer(id, Answer::Done);
                }
                self.detached = true;
                self.base.send_control(Kind::Goodbye, 0);
                self.base.wait(id, Until::Alone);
                if self.protection == Protection::Syncing {
                    self.lose_peer(PeerLost::Asked, None);
                } else {
                    self.base.local(Local::Operator(MemberCommand::Detach));
                }
            }
        }
    }

    // ---- the end of a pairing ----------------------------------------------------------------------

    /// The peer is of no use any more. The guest here runs on; what it said stays held until
    /// nobody else can own the VM.
    fn lose_peer(&mut self, why: PeerLost, said: Option<&str>) {
        let had_peer = self.base.link.any_up() || !self.sender.is_alone();
        let aborted = self.sender.abandon();
        self.greeting = None;
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
        match self.protection {
            Protection::None | Protection::Severed => {}
            Protection::Syncing => {
                self.base.local(Local::ReplicaLost);
                if self.base.member.is_alone() {
                    self.alone();
                } else {
                    self.protection = Protection::Severed;
                }
            }
            Protection::Arming(_) => {
                self.protection = Protection::Severed;
                self.base.local(Local::ReplicaLost);
            }
            Protection::Armed => {
                self.protection = Protection::Severed;
                self.base.local(Local::ReplicationDead);
            }
        }
    }

    /// Nobody else can own the VM now: everything that was held may leave.
    fn alone(&mut self) {
        let was = core::mem::replace(&mut self.protection, Protection::None);
        let news = self.outlet.open(self.base.epoch);
        self.tell(news);
        self.base.op(GuestOp::Replication(ReplicationOp::Stop {
            failover: was != Protection::Syncing,
        }));
        if self.base.failover.mode != ColoMode::None {
            let out = &mut self.base.out;
            self.base.failover.advance(FailoverStatus::Completed, |s| {
                out.push_back(Output::Event(Event::Failover(s)));
            });
            if let Some(exit) = self.base.failover.leave() {
                self.base.event(Event::ColoExit(exit));
            }
        }
        self.base
            .event(Event::Unprotected(self.base.member.generation()));
        self.base.answer_waiting(Until::Alone, Answer::Done);
        self.base
            .answer_waiting(Until::HandedOver, Answer::Refused(Refusal::PeerLost));
    }

    fn member_output(&mut self, output: MemberOutput) {
        match output {
            MemberOutput::DropReplication => {
                if matches!(self.protection, Protection::Arming(_) | Protection::Armed) {
                    self.protection = Protection::Severed;
                    self.lose_peer(PeerLost::Silent, Some("the primary goes on alone"));
                }
                if self.protection == Protection::Severed {
                    self.alone();
                }
            }
            MemberOutput::StartSync { peer } => self.sync_peer = Some(peer),
            MemberOutput::DiscardVm => self.demote(),
            MemberOutput::PauseVm => self.outlet.fence(),
            _ => {}
        }
    }

    /// The other host owns the VM.
    fn demote(&mut self) {
        if core::mem::replace(&mut self.protection, Protection::None) != Protection::None {
            self.base.op(GuestOp::Replication(ReplicationOp::Stop {
                failover: false,
            }));
        }
        self.lose_peer(PeerLost::NotOwner, Some("this host lost the VM"));
        self.base.failover.withdraw();
        if let Some(exit) = self.base.failover.leave() {
            self.base.event(Event::ColoExit(exit));
        }
        self.base.answer_waiting(Until::HandedOver, Answer::Done);
        self.base
            .answer_waiting(Until::Alone, Answer::Refused(Refusal::NotOwner));
        self.base.notify(Notify::Shadows);
        self.demoted = true;
    }
}

impl Machine for Primary {
    fn channels(&self) -> alloc::vec::Vec<Channel> {
        self.base.config.channels().collect()
    }

    fn handle_input(&mut self, now: Instant, input: Input<'_>) -> Result<(), Misuse> {
        debug_assert!(
            self.base.drained(),
            "drain poll_output before the next input"
        );
        self.handle(now, input)?;
        self.pump();
        Ok(())
    }

    fn poll_output(&mut self) -> Option<Output> {
        let should_run = self.should_run();
        let first = self.base.poll_output(should_run);
        first.or_else(|| self.outlet.poll(self.base.permit()))
    }

    fn poll_transmit(&mut self, channel: Channel, budget: usize) -> Option<Transmit> {
        if let Some(transmit) = self.base.poll_queued(channel, budget) {
            return Some(transmit);
        }
        if !self.base.link.is_up(channel) {
            return None;
        }
        let (now, generation) = (self.base.now, self.base.pairing);
        let transmit = self.sender.poll(now, generation, channel, budget)?;
        if let Body::Live(runs) = &transmit.body {
            self.base.stats.sync_pages += runs.pages();
        }
        self.base.progress = now;
        self.base.link.handed_out(channel, &transmit);
        Some(transmit)
    }

    fn poll_demand(&mut self, channel: Channel) -> Demand {
        self.base.demand(channel)
    }

    fn poll_timeout(&self) -> Option<Deadline> {
        let base = &self.base;
        let greeting = self.greeting.map(|since| Deadline {
            at: since + base.config.handshake,
            why: TimerKind::Handshake,
        });
        let running = self.sender.is_between() && self.protection == Protection::Armed;
        let epoch = (running && base.guest_ops.idle()).then(|| Deadline {
            at: self.pace.due(),
            why: TimerKind::Epoch,
        });
        let unmatched = running.then(|| self.outlet.unmatched_since()).flatten();
        let compare = unmatched.map(|at| Deadline {
            at: at + base.config.compare_timeout,
            why: TimerKind::Compare,
        });
        let stall = self.sender.awaits().then(|| base.stall());
        let arming = match self.protection {
            Protection::Arming(since) => Some(Deadline {
                at: since + base.config.stall,
                why: TimerKind::Stall,
            }),
            _ => None,
        };
        base.soonest([greeting, epoch, compare, stall, arming])
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
            phase: match self.protection {
                Protection::Arming(_) => "arranging ownership",
                Protection::Severed => "settling ownership",
                _ => self.sender.name(),
            },
            mode: self.outlet.mode(),
            checkpoint_delay: self.pace.longest(),
            replica_valid: true,
            ..self.base.status()
        }
    }
}
