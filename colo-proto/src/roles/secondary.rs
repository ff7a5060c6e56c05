//! The secondary: holds the primary's last whole state, shadows its guest in lockstep mode, and
//! takes over.
//!
//! Two rules above all: a half-received checkpoint never touches the running guest, and a whole
//! one is applied even if the peer is gone.
//!
//! The file reads in the order of a pairing: inputs, hello, synchronisation, checkpoint, output,
//! commands, the end, takeover.

use alloc::string::String;
use bytes::{Bytes, BytesMut};
use core::time::Duration;

use crate::{
    base::{Base, FRAMES_STUCK, Until},
    command::{Answer, Command, CommandId, Refusal},
    epoch::{Broken, Receiver, Step},
    error::{Misuse, PeerFault},
    event::{Event, PeerLost},
    id::{Channel, Epoch, Generation, Role},
    machine::{
        Deadline, Demand, GuestDone, GuestOp, GuestOpKind, Input, Machine, Notify, Output,
        ReplicationOp, TimerKind, Transmit,
    },
    member::{BootId, Command as MemberCommand, Local, MemberOutput, MemberState, Unprotected},
    mutation::bug,
    output::{Outlet, Serving, Shadowing},
    pairing::link::Item,
    stats::Stats,
    status::{ColoMode, FailoverStatus, Mode, Status},
    time::Instant,
    wire::{FLAG_FIRST, HEAD_LEN, Head, Hello, Kind, RUN_LEN, decode_reasons, encode_runs},
};

/// The secondary of a pair, or a host that wants to become one. See the
/// [crate documentation](crate) for the loop that drives it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Secondary {
    pub(crate) base: Base,
    receiver: Receiver,
    dialling: Dialling,
    /// How long the next attempt waits, if this one fails as the last ones did.
    pause: Duration,
    outlet: Outlet<Shadowing>,
    /// The member waits for the checkpoint in hand to be finished or dropped.
    settling: bool,
    /// An operator wants no owner sought.
    detached: bool,
    /// The generation granted to this host; the driver's [`Node`](crate::node::Node) makes this a
    /// primary.
    pub(crate) promoted: Option<Promotion>,
}

/// How this host becomes the owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Promotion {
    /// By taking over from the replica here.
    TakeOver(Generation),
    /// By booting the VM: the first owner, or the last one after both hosts were down.
    ColdBoot(Generation),
}

/// Whether and when the primary is dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Dialling {
    /// At this time, if wanted.
    At(Instant),
    /// A connection is being made, or the hello is on its way.
    Connecting(Instant),
    /// The primary took us.
    Accepted,
}

impl Secondary {
    pub(crate) fn new(base: Base, outlet: Outlet<Shadowing>) -> Self {
        let config = &base.config;
        Self {
            receiver: Receiver::new(config),
            dialling: Dialling::At(base.now),
            pause: config.redial,
            outlet,
            settling: false,
            detached: false,
            promoted: None,
            base,
        }
    }

    /// A host without a replica.
    pub(crate) fn first(base: Base) -> Self {
        let outlet = Outlet::shadowing(&base.config);
        Self::new(base, outlet)
    }

    /// Does what the member wants at the start.
    pub(crate) fn start(&mut self) {
        self.pump();
    }

    /// After a grant: what the primary that this host is now goes on with.
    pub(crate) fn ended(self, how: Promotion) -> (Base, Outlet<Serving>) {
        let mut base = self.base;
        base.fenced = false;
        let outlet = match how {
            Promotion::TakeOver(_) => self.outlet.take_over(base.epoch),
            Promotion::ColdBoot(_) => self.outlet.boot(base.epoch),
        };
        (base, outlet)
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
                if was_up || matches!(self.dialling, Dialling::Accepted) {
                    self.lose_peer(PeerLost::HungUp(channel), None);
                } else if matches!(self.dialling, Dialling::Connecting(..)) {
                    // Nobody came, so nobody left.
                    self.redial(false);
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
            // The world talks to the primary; what it mirrors comes over Net.
            Input::FromWorld(_) => {}
            Input::Dirty(slot, words) => {
                self.base.check_slot(slot)?;
                match self.base.guest_ops.busy() {
                    Some(GuestOpKind::Harvest) => {
                        self.receiver.own_dirty(slot, words);
                    }
                    // Asked for by the primary that this host was until now.
                    Some(GuestOpKind::Capture) => {}
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

    /// Lets everything that became possible happen.
    fn pump(&mut self) {
        loop {
            while let Some(output) = self.base.member.poll_output() {
                if let Some(output) = self.base.member_output(output) {
                    self.member_output(output);
                }
                if self.promoted.is_some() {
                    return;
                }
            }
            if !self.advance() {
                break;
            }
        }
        self.deliver();
        self.acknowledge();
    }

    /// One step that needs no further input. False if there is none.
    fn advance(&mut self) -> bool {
        let now = self.base.now;
        if self.base.guest_ops.idle_and_stopped()
            && let Some(step) = self.receiver.paused()
        {
            self.step(step);
            return true;
        }
        if self.base.failover.mode == ColoMode::None
            && self.base.member.state() == MemberState::Secondary
            && self.receiver.is_whole()
        {
            // The state is whole here and the owner has said that this host may take over.
            self.base.failover.enter(ColoMode::Secondary);
            self.pause = self.base.config.redial;
            let (mode, epoch) = (self.outlet.mode(), self.base.epoch);
            self.base.event(Event::Protected { mode, epoch });
            return true;
        }
        let settled = !self.receiver.loading() || bug!(self.base.config, SettledWhileLoading);
        if self.settling && settled {
            self.settling = false;
            self.base.local(Local::Settled);
            return true;
        }
        if self.is_alone() && !self.receiver.is_empty() {
            // Whatever replica there was, the member has given it up.
            self.leave_colo();
            self.receiver.discard();
        }
        if let Dialling::At(at) = self.dialling
            && now >= at
            && self.may_dial()
        {
            self.dialling = Dialling::Connecting(now);
            self.base.push(Output::Dial(Channel::Control));
            return true;
        }
        if let Dialling::Connecting(since) = self.dialling
            && now.since(since) >= self.base.config.handshake
        {
            let waited = self.base.config.handshake;
            self.lose_peer(PeerLost::TooSlow(waited), Some("no welcome in time"));
            return true;
        }
        if let Some(why) = self.base.frames_stuck() {
            self.lose_peer(why, Some(FRAMES_STUCK));
            return true;
        }
        if self.receiver.awaits()
            && let Some(why) = self.base.stalled(self.receiver.name())
        {
            // Past the commit point only the guest side here can end the wait; it goes on.
            self.base.progress = now;
            self.lose_peer(why, Some("no progress"));
            return true;
        }
        false
    }

    fn item(&mut self, channel: Channel, item: Item) {
        self.base.moved(channel);
        let result = match item {
            Item::Message(head, body) => match head.kind {
                Kind::Welcome => self.welcome(&head, &body),
                Kind::Refuse => {
                    let reasons = decode_reasons(&body);
                    self.base.event(Event::PeerRefused { reasons });
                    self.lose_peer(PeerLost::Unfit, None);
                    return;
                }
                Kind::Leave => {
                    let said = decode_reasons(&body).into_iter().next().unwrap_or_default();
                    self.lose_peer(PeerLost::Told(said), None);
                    return;
                }
                _ => self
                    .base
                    .check_generation(&head)
                    .and_then(|()| self.message(channel, head, &body)),
            },
            Item::Contents(head) => self
                .base
                .check_generation(&head)
                .and_then(|()| self.state_announced(channel, &head)),
            Item::Placed(head) => {
                self.receiver.placed(&head);
                self.check_whole()
            }
            Item::Frame(head, frame) => self.base.check_generation(&head).and_then(|()| {
                if head.kind == Kind::Input {
                    let first = head.flags & FLAG_FIRST != 0;
                    self.outlet.store(head.number, first, frame)
                } else {
                    Err(self.receiver.out_of_phase(head.kind))
                }
            }),
        };
        if let Err(fault) = result {
            self.fault(fault);
        }
    }

    fn message(&mut self, channel: Channel, head: Head, body: &Bytes) -> Result<(), PeerFault> {
        match head.kind {
            Kind::Pages => self.pages(channel, &head, body),
            Kind::LaneEnd => self.lane_end(channel, &head),
            Kind::CheckpointRequest => self.request(head.number),
            Kind::VmstateSend => {
                self.receiver.announced(&head, body)?;
                self.check_whole()
            }

            Kind::Released => {
                if Epoch(head.number) == self.base.epoch {
                    self.outlet.heard_there(u64::from(head.count));
                }
                Ok(())
            }
            Kind::Goodbye => {
                self.lose_peer(PeerLost::Goodbye, None);
                if !self.receiver.loading() {
                    self.leave_colo();
                    self.receiver.discard();
                }
                self.base.local(Local::ReplicaLost);
                Ok(())
            }
            _ => Err(self.receiver.out_of_phase(head.kind)),
        }
    }

    fn fault(&mut self, fault: PeerFault) {
        let said = alloc::format!("{fault}");
        self.lose_peer(PeerLost::Faulty(fault), Some(&said));
    }

    // ---- behind another wire ------------------------------------------------------------------

    /// A secondary whose primary another wire's translation has accepted and connected.
    pub(crate) fn accepted(base: Base, primary: BootId) -> Self {
        let mut secondary = Self::first(base);
        secondary.dialling = Dialling::Accepted;
        secondary.base.peer = Some(primary);
        secondary.base.link.up_all();
        secondary
    }

    /// Takes what a translation made of another wire's bytes.
    pub(crate) fn handle_item(&mut self, now: Instant, channel: Channel, item: Item) {
        self.base.now = self.base.now.max(now);
        self.item(channel, item);
        self.pump();
    }

    // ---- first contact ------------------------------------------------------------------------

    fn channel_up(&mut self, channel: Channel) -> Result<(), Misuse> {
        self.base.connected(channel)?;
        match (channel, self.dialling) {
            (Channel::Control, Dialling::Connecting(..)) => {
                let hello = self.base.config.hello(self.base.boot.0, self.outlet.mode());
                let head = Head::new(Kind::Hello, Generation(0), 0);
                let body = hello.encode();
                self.base.send(Channel::Control, head, &body);
            }
            (_, Dialling::Accepted) => {}
            _ => {
                self.base.link.down(channel)?;
                self.base.push(Output::HangUp(channel));
            }
        }
        Ok(())
    }

    fn welcome(&mut self, head: &Head, body: &Bytes) -> Result<(), PeerFault> {
        let Dialling::Connecting(..) = self.dialling else {
            return Err(self.receiver.out_of_phase(Kind::Welcome));
        };
        let theirs =
            Hello::decode(Kind::Welcome.name(), body).map_err(|error| PeerFault::Decode {
                channel: Channel::Control,
                error,
            })?;
        let ours = self.base.config.hello(self.base.boot.0, self.outlet.mode());
        let mut reasons = ours.differences(&theirs);
        if theirs.lanes != self.base.config.lanes {
            reasons.push(alloc::format!(
                "{} RAM lanes here and {} there",
                self.base.config.lanes,
                theirs.lanes
            ));
        }
        if !reasons.is_empty() {
            self.base.refuse_peer(reasons);
            self.lose_peer(PeerLost::Unfit, None);
            return Ok(());
        }
        self.dialling = Dialling::Accepted;
        self.base.pairing = head.generation;
        self.base.peer = Some(BootId(theirs.boot));
        self.outlet.set_mode(theirs.mode);
        self.base.event(Event::PeerAccepted { boot: theirs.boot });
        let channels = self.base.config.channels();
        for channel in channels.filter(|c| *c != Channel::Control) {
            self.base.push(Output::Dial(channel));
        }
        Ok(())
    }

    // ---- pages --------------------------------------------------------------------------------

    /// The table of a batch: decides where its pages go, before a byte of them is read.
    fn pages(&mut self, channel: Channel, head: &Head, table: &[u8]) -> Result<(), PeerFault> {
        let runs = Receiver::table(channel, head, table)?;
        let Channel::Ram(lane) = channel else {
            return Err(self.receiver.out_of_phase(Kind::Pages));
        };
        self.begin(head);
        let sink = self.receiver.pages(lane, head, runs)?;
        self.base.link.place(channel, sink);
        Ok(())
    }

    fn lane_end(&mut self, channel: Channel, head: &Head) -> Result<(), PeerFault> {
        let Channel::Ram(lane) = channel else {
            return Err(self.receiver.out_of_phase(Kind::LaneEnd));
        };
        self.begin(head);
        let step = self.receiver.lane_end(lane, head)?;
        self.step(step);
        self.check_whole()
    }

    /// A live message may be the first of all: disks begin with it, and client frames anew.
    fn begin(&mut self, head: &Head) {
        if self.receiver.begins(head) {
            self.outlet.begin_anew();
            let start = ReplicationOp::Start(Role::Secondary);
            self.base.op(GuestOp::Replication(start));
        }
    }

    /// Does what the receiver wants next.
    fn step(&mut self, step: Step) {
        match step {
            Step::Nothing => {}
            Step::Tell(kind, number) => {
                self.base.send_control(kind, number);
                self.base.progress = self.base.now;
            }
            Step::Do(op) => self.base.op(op),
        }
    }

    // ---- a checkpoint, step by step -------------------------------------------------------------

    /// CHECKPOINT_REQUEST: stop.
    fn request(&mut self, number: u64) -> Result<(), PeerFault> {
        self.receiver.request(self.base.epoch, number)?;
        self.base.local(Local::CheckpointRunning(true));
        Ok(())
    }

    /// What this side wrote itself is known: it is reported, then the reply.
    fn harvested(&mut self) {
        let step = self.receiver.harvested();
        self.step(step);
    }

    fn poll_report(&mut self) -> Option<Transmit> {
        let (runs, step) = self.receiver.poll_report()?;
        if !runs.is_empty() {
            let mut table = BytesMut::with_capacity(runs.as_slice().len() * RUN_LEN);
            encode_runs(&runs, &mut table);
            let head = self.base.head(Kind::OwnDirty, 0);
            self.base.send(Channel::Control, head, &table);
        }
        self.step(step);
        self.base.poll_queued(Channel::Control, usize::MAX)
    }

    fn state_announced(&mut self, channel: Channel, head: &Head) -> Result<(), PeerFault> {
        match self.receiver.state(head)? {
            Some(sink) => self.base.link.place(channel, sink),
            None => self.base.link.nothing_to_place(channel),
        }
        self.check_whole()
    }

    /// Whether everything is here; then the guest side verifies the state.
    fn check_whole(&mut self) -> Result<(), PeerFault> {
        let step = self.receiver.check(self.base.link.placing())?;
        self.step(step);
        Ok(())
    }

    /// VMSTATE_RECEIVED: the commit point. From here on this side finishes by itself.
    fn checked(&mut self) {
        let Some((whole, runs)) = self.receiver.checked() else {
            return;
        };
        let epoch = whole.epoch;
        self.base.send_control(Kind::VmstateReceived, epoch.0);
        self.base.op(GuestOp::CommitRam { epoch, runs });
        if bug!(self.base.config, AckBeforeLoaded) && !whole.first {
            self.base.send_control(Kind::VmstateLoaded, epoch.0);
        }
    }

    fn replicated(&mut self) {
        if let Some((epoch, load)) = self.receiver.replicated() {
            self.base.notify(Notify::FilterCheckpoint(epoch));
            self.base.op(load);
        }
    }

    /// VMSTATE_LOADED (CHECKPOINT_READY for the first): the guest here has the primary's state.
    fn loaded(&mut self, epoch: Epoch) {
        let Some(whole) = self.receiver.loaded(epoch) else {
            return;
        };
        self.base.epoch = whole.epoch;
        if let Some(mode) = self.outlet.commit(whole.inputs, whole.mode) {
            self.base.event(Event::ModeChanged(mode));
        }
        self.base.stats.checkpoints += 1;
        self.base.stats.pages += whole.pages;
        self.base.stats.state_bytes += whole.state_len;
        self.base.local(Local::Applied(whole.epoch));
        self.base.local(Local::CheckpointRunning(false));
        if whole.first {
            if let Some(from) = self.base.peer {
                self.base.local(Local::Synced { from, epoch });
            }
            self.base.send_control(Kind::CheckpointReady, whole.epoch.0);
        } else if !bug!(self.base.config, AckBeforeLoaded) {
            self.base.send_control(Kind::VmstateLoaded, whole.epoch.0);
        }
    }

    // ---- output and input -------------------------------------------------------------------------

    fn frame_from_guest(&mut self, since: Epoch, frame: Bytes) -> Result<(), Misuse> {
        // Without a replica it is the primary's guest that was here until now.
        let newest = self.base.epoch;
        if self.receiver.is_empty() || !self.outlet.is_said(newest, since, &frame)? {
            return Ok(());
        }
        if !self.base.net_is_full(HEAD_LEN + frame.len()) {
            let head = self.base.head(Kind::Output, since.0);
            self.base.send(Channel::Net, head, &frame);
        }
        if let Some(queue) = self.outlet.keep(frame) {
            self.base.event(Event::QueueFull(queue));
        }
        Ok(())
    }

    fn acknowledge(&mut self) {
        // One later acknowledges all.
        if self.base.net_is_full(HEAD_LEN) {
            return;
        }
        if let Some(index) = self.outlet.acknowledge() {
            let head = self.base.head(Kind::InputAck, index);
            self.base.send(Channel::Net, head, &[]);
        }
    }

    /// Client frames go to the guest while it shadows, and after a commit those it has not consumed
    /// go again.
    fn deliver(&mut self) {
        if !self.receiver.is_whole() || self.promoted.is_some() {
            return;
        }
        while let Some((index, frame)) = self.outlet.poll_input() {
            self.base.push(Output::ToGuest { index, frame });
        }
    }

    // ---- the guest --------------------------------------------------------------------------------

    fn guest_done(&mut self, done: GuestDone) {
        self.base.progress = self.base.now;
        match done {
            GuestDone::Resumed => self.receiver.resumed(),
            GuestDone::Harvested => self.harvested(),
            GuestDone::StateChecked(_) => self.checked(),
            GuestDone::RamCommitted(epoch) => {
                let step = self.receiver.ram_committed(epoch);
                self.step(step);
            }

            GuestDone::Replication(ReplicationOp::Checkpoint) => self.replicated(),
            GuestDone::StateLoaded(epoch) => self.loaded(epoch),
            GuestDone::Failed { op, why } => self.guest_failed(op, why),
            _ => {}
        }
    }

    fn guest_failed(&mut self, op: GuestOpKind, why: String) {
        if op == GuestOpKind::CheckState
            && let Some(epoch) = self.receiver.checks()
        {
            // The state is the peer's fault, and nothing here was touched.
            return self.fault(PeerFault::BadState { epoch, why });
        }
        self.base.event(Event::GuestFailed { op, why });
        if op == GuestOpKind::CheckState {
            // Of a checkpoint that was given up meanwhile; nothing was touched.
            return;
        }
        if op == GuestOpKind::Pause {
            self.base
                .answer_waiting(Until::Stopped, Answer::Refused(Refusal::GuestFailed));
        }
        // Half loaded, or a guest that cannot be stopped or asked: no replica any more. It is
        // never offered for a takeover (spec checkpoint C4), and the member abstains.
        self.receiver.discard();
        self.base.guest_ops.forget_queued();
        self.lose_peer(
            PeerLost::Local(op),
            Some("the secondary's guest side failed"),
        );
        self.leave_colo();
        self.base.local(Local::ReplicaLost);
    }

    fn should_run(&self) -> bool {
        self.receiver.is_whole()
            && self.outlet.mode() == Mode::Lockstep
            && self.base.link.all_up()
            && !self.base.stopped
            && !self.base.fenced
            && !self.settling
    }

    // ---- commands ---------------------------------------------------------------------------------

    fn command(&mut self, id: CommandId, command: Command) {
        match command {
            Command::LostHeartbeat if self.base.failover.mode == ColoMode::None => {
                self.base.refuse(id, Refusal::NotProtected);
            }
            Command::LostHeartbeat if self.receiver.is_empty() => {
                self.base.refuse(id, Refusal::NoReplica);
            }
            Command::LostHeartbeat => {
                if !self.base.failover.request() {
                    return self.base.refuse(id, Refusal::FailoverInProgress);
                }
                self.base.event(Event::Failover(FailoverStatus::Require));
                self.base.wait(id, Until::Alone);
                self.base.local(Local::Operator(MemberCommand::FailOver));
            }
            Command::XenSetReplication {
                enable,
                role,
                failover,
            } => self.base.xen_set_replication(id, enable, role, failover),
            Command::Detach => {
                self.detached = true;
                self.lose_peer(PeerLost::Asked, Some("detached by an operator"));
                self.base.local(Local::ReplicaLost);
                self.base.answer(id, Answer::Done);
            }
            Command::Override => {
                self.base.wait(id, Until::Alone);
                self.base.local(Local::Operator(MemberCommand::Override));
            }
            Command::Attach => {
                self.detached = false;
                self.base.answer(id, Answer::Done);
            }
            Command::Shutdown => {
                self.detached = true;
                self.lose_peer(PeerLost::Asked, Some("the secondary ends"));
                self.base.local(Local::ReplicaLost);
                self.base.answer(id, Answer::Done);
            }
            Command::CheckpointNow
            | Command::FailOver
            | Command::Stop
            | Command::Continue
            | Command::CheckpointDelay(_)
            | Command::SetMode(_)
            | Command::XenDoCheckpoint => self.base.refuse(id, Refusal::WrongRole("primary")),
        }
    }

    // ---- the end of a pairing ----------------------------------------------------------------------

    /// The connection is of no use any more. A checkpoint before its commit point leaves no trace;
    /// one after it goes on.
    fn lose_peer(&mut self, why: PeerLost, said: Option<&str>) {
        let had_peer = !matches!(self.dialling, Dialling::At(..));
        if let Some(said) = said {
            self.base.send_leave(said);
        }
        let peer = self.base.peer;
        self.base.hang_up();
        if self.receiver.loading() {
            // Needed to name the owner when the load ends.
            self.base.peer = peer;
        }
        #[cfg(feature = "mutations")]
        if bug!(self.base.config, HalfAppliedOnLoss)
            && let Some(op) = self.receiver.half_applied()
        {
            self.base.op(op);
        }
        let broken = self.receiver.abandon();
        if broken == Broken::Checkpoint {
            self.base.stats.aborted += 1;
            self.base.local(Local::CheckpointRunning(false));
        }
        if broken != Broken::Nothing {
            self.base.guest_ops.forget_queued();
        }
        self.outlet.forget_peer();
        if had_peer {
            let unfit = matches!(
                why,
                PeerLost::Unfit | PeerLost::Faulty(_) | PeerLost::Local(_)
            );
            self.base.event(Event::PeerLeft(why));
            self.redial(unfit);
        }
        self.base.local(Local::ReplicationDead);
    }

    /// When to dial again: soon after a broken connection; later and later while the two do not fit
    /// or the state cannot be loaded, since each attempt may send all memory and hold output.
    fn redial(&mut self, unfit: bool) {
        let first = self.base.config.redial;
        if unfit {
            self.pause = (self.pause * 2).min(first * 16);
        } else {
            self.pause = first;
        }
        self.dialling = Dialling::At(self.base.now + self.pause);
    }

    /// Whether this host seeks an owner and nothing of an earlier pairing is left.
    fn is_alone(&self) -> bool {
        self.base.member.state() == MemberState::Syncing
            && !self.base.link.any_up()
            && !self.receiver.loading()
    }

    /// Whether the owner is dialled as soon as the pause after the last attempt is over.
    fn may_dial(&self) -> bool {
        self.is_alone()
            && self.base.guest_ops.idle_and_stopped()
            && !self.detached
            && self.base.is_fit()
    }

    fn leave_colo(&mut self) {
        if let Some(exit) = self.base.failover.leave() {
            self.base.event(Event::ColoExit(exit));
        }
        self.base.failover.withdraw();
        self.base
            .answer_waiting(Until::Alone, Answer::Refused(Refusal::NotOwner));
    }

    // ---- takeover ---------------------------------------------------------------------------------

    fn member_output(&mut self, output: MemberOutput) {
        match output {
            MemberOutput::Settle => {
                self.settling = true;
                if self.receiver.loading() {
                    self.walk_failover(FailoverStatus::Relaunch);
                }
                // A primary that lives on would send the next checkpoint into the takeover.
                if self.base.link.any_up() {
                    self.lose_peer(PeerLost::Silent, Some("the secondary takes over"));
                }
            }
            MemberOutput::StartTakeover { generation } => self.take_over(generation),
            MemberOutput::ColdBoot { .. } if self.base.used => {
                // What is in memory now is not what an empty machine begins with.
                self.base.event(Event::GuestFailed {
                    op: GuestOpKind::Resume,
                    why: String::from("it has run here before and can be booted only by a new process: start this host again as primary"),
                });
                self.base.set_broken(true);
                self.base
                    .answer_waiting(Until::Alone, Answer::Refused(Refusal::GuestFailed));
            }
            MemberOutput::ColdBoot { generation } => {
                self.base.answer_waiting(Until::Alone, Answer::Done);
                // An operator may have made the disk a replica's meanwhile.
                self.base.op(GuestOp::Replication(ReplicationOp::Stop {
                    failover: false,
                }));
                self.base.notify(Notify::Serves);
                self.promoted = Some(Promotion::ColdBoot(generation));
            }
            MemberOutput::DiscardVm => {
                self.lose_peer(PeerLost::NotOwner, Some("the replica is old"));
                self.leave_colo();
                self.receiver.discard();
                self.base.fenced = false;
            }
            _ => {}
        }
    }

    fn walk_failover(&mut self, to: FailoverStatus) {
        let out = &mut self.base.out;
        self.base
            .failover
            .advance(to, |s| out.push_back(Output::Event(Event::Failover(s))));
    }

    /// Ownership is granted and the checkpoint in hand is settled: this guest is the VM.
    fn take_over(&mut self, generation: Generation) {
        if self.base.link.any_up() {
            self.lose_peer(PeerLost::Silent, Some("the secondary takes over"));
        }
        self.base
            .op(GuestOp::Replication(ReplicationOp::Stop { failover: true }));
        self.base.notify(Notify::FilterFailover);
        self.base.notify(Notify::Serves);
        self.walk_failover(FailoverStatus::Completed);
        let epoch = self.base.epoch;
        self.base.event(Event::Promoted { generation, epoch });
        self.base.event(Event::Unprotected(generation));
        if let Some(exit) = self.base.failover.leave() {
            self.base.event(Event::ColoExit(exit));
        }
        self.base.answer_waiting(Until::Alone, Answer::Done);
        self.promoted = Some(Promotion::TakeOver(generation));
    }
}

impl Machine for Secondary {
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
        self.base.poll_output(should_run)
    }

    fn poll_transmit(&mut self, channel: Channel, budget: usize) -> Option<Transmit> {
        if let Some(transmit) = self.base.poll_queued(channel, budget) {
            return Some(transmit);
        }
        (channel == Channel::Control).then(|| self.poll_report())?
    }

    fn poll_demand(&mut self, channel: Channel) -> Demand {
        self.base.demand(channel)
    }

    fn poll_timeout(&self) -> Option<Deadline> {
        let base = &self.base;
        let dial = match self.dialling {
            Dialling::At(at) if self.may_dial() => Some(at),
            Dialling::Connecting(since) => Some(since + base.config.handshake),
            _ => None,
        };
        let dial = dial.map(|at| Deadline {
            at,
            why: TimerKind::Handshake,
        });
        let stall = self.receiver.awaits().then(|| base.stall());
        base.soonest([dial, stall])
    }

    fn stats(&self) -> Stats {
        self.outlet.count(self.base.stats)
    }

    fn status(&self) -> Status {
        // Until its commit point a checkpoint leaves the one before untouched, and after it the one
        // in hand is applied whatever happens.
        let valid = self.receiver.has_replica() || self.receiver.loading();
        let unprotected = self.base.member.unprotected(self.base.now);
        let unpaired = Unprotected::Unpaired(self.base.member.state());
        Status {
            role: Role::Secondary,
            protected: valid && unprotected.is_none(),
            unprotected: unprotected.or_else(|| (!valid).then_some(unpaired)),
            mode: self.outlet.mode(),
            phase: self.receiver.name(),
            replica_valid: valid,
            ..self.base.status()
        }
    }
}
