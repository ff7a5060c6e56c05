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

use crate::{
    base::Base,
    command::{Answer, Refusal},
    epoch::{Broken, Receiver, Step},
    error::{Misuse, PeerFault},
    event::{Event, PeerLost},
    id::{Channel, Epoch, Generation, Role, Slot},
    machine::{
        Deadline, Demand, GuestDone, GuestOp, GuestOpKind, Input, Machine, Notify, Output,
        ReplicationOp, Transmit,
    },
    member::{BootId, Command as MemberCommand, Local, MemberOutput, MemberState, Unprotected},
    mutation::bug,
    operator::{Act, Standing, Until, Why},
    output::{Outlet, Serving, Shadowing, flow::Report, translate::Lasting},
    pairing::{Dial, FRAMES_STUCK, Item},
    roles::Conduct,
    stats::Stats,
    status::{ColoMode, FailoverStatus, Mode, Status},
    time::Instant,
    wire::{FLAG_FIRST, HEAD_LEN, Head, Kind, RUN_LEN, encode_runs},
};

/// The secondary of a pair, or a host that wants to become one. See the
/// [crate documentation](crate) for the loop that drives it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Secondary {
    pub(crate) base: Base,
    receiver: Receiver,
    dial: Dial,
    outlet: Outlet<Shadowing>,
    /// The member waits for the checkpoint in hand to be finished or dropped.
    settling: bool,
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

impl Secondary {
    pub(crate) fn new(base: Base, outlet: Outlet<Shadowing>) -> Self {
        let config = &base.config;
        Self {
            receiver: Receiver::new(config),
            dial: Dial::new(config, base.now),
            outlet,
            settling: false,
            promoted: None,
            base,
        }
    }

    /// A host without a replica.
    pub(crate) fn first(base: Base) -> Self {
        let outlet = Outlet::shadowing(&base.config, base.boot.0);
        Self::new(base, outlet)
    }

    /// Lets everything that became possible happen, and client frames last.
    fn pump(&mut self) {
        if self.settle() {
            self.deliver();
            self.acknowledge();
        }
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

    // ---- behind another wire ------------------------------------------------------------------

    /// A secondary whose primary another wire's translation has accepted and connected.
    pub(crate) fn accepted(base: Base, primary: BootId) -> Self {
        let mut secondary = Self::first(base);
        secondary.dial.accept();
        secondary.base.link.peer = Some(primary);
        secondary.base.link.up_all();
        secondary
    }

    // ---- first contact ------------------------------------------------------------------------

    fn welcome(&mut self, head: &Head, body: &Bytes) -> Result<(), PeerFault> {
        let config = &self.base.config;
        let ours = config.hello(self.base.boot.0, self.outlet.mode());
        let theirs = match self.dial.welcome(&ours, body) {
            None => return Err(self.receiver.out_of_phase(Kind::Welcome)),
            Some(Err(fault)) => return Err(fault),
            Some(Ok(Err(reasons))) => {
                self.base.refuse_peer(reasons);
                self.lose_peer(PeerLost::Unfit, None);
                return Ok(());
            }
            Some(Ok(Ok(theirs))) => theirs,
        };
        self.dial.accept();
        self.base.link.generation = head.generation;
        self.base.link.peer = Some(BootId(theirs.boot));
        self.outlet.set_mode(theirs.mode);
        self.base.event(Event::PeerAccepted { boot: theirs.boot });
        let channels = self.base.config.channels();
        for channel in channels.filter(|c| *c != Channel::Control) {
            self.base.push(Output::Dial(channel));
        }
        Ok(())
    }

    // ---- messages ------------------------------------------------------------------------------

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
            Kind::Connection => {
                let body = entry(Kind::Connection.name(), body)?;
                let report = Report::from_bytes(Epoch(head.number), &body);
                self.outlet.report(self.base.now, report);
                Ok(())
            }
            Kind::Lasting => {
                for bytes in body.chunks(Lasting::BYTES) {
                    let lasting = Lasting::from_bytes(&entry(Kind::Lasting.name(), bytes)?);
                    self.outlet.inherit(self.base.now, lasting);
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

    // ---- pages --------------------------------------------------------------------------------

    /// The table of a batch: decides where its pages go, before a byte of them is read.
    fn pages(&mut self, channel: Channel, head: &Head, table: &[u8]) -> Result<(), PeerFault> {
        let runs = Receiver::table(channel, head, table)?;
        let Channel::Ram(lane) = channel else {
            return Err(self.receiver.out_of_phase(Kind::Pages));
        };
        self.begin(head);
        let sink = self.receiver.pages(lane, head, runs)?;
        self.base.link.place(channel, Some(sink));
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
                self.base.link.progressed(self.base.now);
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
            let head = self.base.link.head(Kind::OwnDirty, 0);
            self.base.send(Channel::Control, head, &table);
        }
        self.step(step);
        self.base.link.poll_queued(Channel::Control, usize::MAX)
    }

    fn state_announced(&mut self, channel: Channel, head: &Head) -> Result<(), PeerFault> {
        let sink = self.receiver.state(head)?;
        self.base.link.place(channel, sink);
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
        if let Some(mode) = self
            .outlet
            .commit(self.base.now, epoch, whole.inputs, whole.mode)
        {
            self.base.event(Event::ModeChanged(mode));
        }
        self.base.stats.checkpoints += 1;
        self.base.stats.pages += whole.pages;
        self.base.stats.state_bytes += whole.state_len;
        self.base.local(Local::Applied(whole.epoch));
        self.base.local(Local::CheckpointRunning(false));
        if whole.first {
            if let Some(from) = self.base.link.peer {
                self.base.local(Local::Synced { from, epoch });
            }
            self.base.send_control(Kind::CheckpointReady, whole.epoch.0);
        } else if !bug!(self.base.config, AckBeforeLoaded) {
            self.base.send_control(Kind::VmstateLoaded, whole.epoch.0);
        }
    }

    // ---- output and input -------------------------------------------------------------------------

    fn acknowledge(&mut self) {
        // One later acknowledges all.
        if self.base.link.net_is_full(HEAD_LEN) {
            return;
        }
        if let Some((index, reports)) = self.outlet.acknowledge() {
            let mut head = self.base.link.head(Kind::InputAck, index);
            head.count = reports;
            self.base.send(Channel::Net, head, &[]);
        }
    }

    /// Client frames go to the guest while it shadows, and after a commit those it has not consumed
    /// go again.
    fn deliver(&mut self) {
        if !self.receiver.is_whole() || self.promoted.is_some() {
            return;
        }
        while let Some((index, frame)) = self.outlet.poll_input(self.base.now) {
            self.base.push(Output::ToGuest { index, frame });
        }
    }

    // ---- the guest --------------------------------------------------------------------------------

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
            self.base.refuse_stop();
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

    // ---- the end of a pairing ----------------------------------------------------------------------

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
            && !self.dial.is_detached()
            && self.base.is_fit()
    }

    fn leave_colo(&mut self) {
        self.base.leave_colo(false);
        let lost = Answer::Refused(Refusal::NotOwner);
        self.base.answer_waiting(Until::Alone, lost);
    }

    // ---- takeover ---------------------------------------------------------------------------------

    /// Ownership is granted and the checkpoint in hand is settled: this guest is the VM.
    fn take_over(&mut self, generation: Generation) {
        if self.base.link.any_up() {
            self.lose_peer(PeerLost::Silent, Some("the secondary takes over"));
        }
        self.base.stop_replication(true);
        self.base.notify(Notify::FilterFailover);
        self.base.notify(Notify::Serves);
        self.base.walk_failover(FailoverStatus::Completed);
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

/// The bytes of one entry, all of them.
fn entry<const N: usize>(message: &'static str, bytes: &[u8]) -> Result<[u8; N], PeerFault> {
    bytes.try_into().map_err(|_| PeerFault::Field {
        message,
        field: "length",
        got: bytes.len() as u64,
        expected: N as u64,
    })
}

impl Conduct for Secondary {
    fn base(&self) -> &Base {
        &self.base
    }

    fn base_mut(&mut self) -> &mut Base {
        &mut self.base
    }

    fn is_over(&self) -> bool {
        self.promoted.is_some()
    }

    /// What a capture yields was asked for by the primary that this host was until now.
    fn dirty(&mut self, asked: GuestOpKind, slot: Slot, words: &[u64]) {
        if asked == GuestOpKind::Harvest {
            self.receiver.own_dirty(slot, words);
        }
    }

    /// The world talks to the primary; what that mirrors comes over Net.
    fn frame_from_world(&mut self, _: Bytes) {}

    fn channel_up(&mut self, channel: Channel) -> Result<(), Misuse> {
        self.base.link.up(channel)?;
        match channel {
            Channel::Control if self.dial.connecting() => {
                let hello = self.base.config.hello(self.base.boot.0, self.outlet.mode());
                let head = Head::new(Kind::Hello, Generation(0), 0);
                let body = hello.encode();
                self.base.send(Channel::Control, head, &body);
            }
            _ if self.dial.accepted() => {}
            _ => {
                self.base.link.down(channel)?;
                self.base.push(Output::HangUp(channel));
            }
        }
        Ok(())
    }

    fn channel_down(&mut self, channel: Channel, was_up: bool) {
        if was_up || self.dial.accepted() {
            self.lose_peer(PeerLost::HungUp(channel), None);
        } else if self.dial.connecting() {
            // Nobody came, so nobody left.
            self.dial.again(self.base.now, false);
        }
    }

    fn contact(&mut self, item: &Item) -> Option<Result<(), PeerFault>> {
        match item {
            Item::Message(head, body) if head.kind == Kind::Welcome => {
                Some(self.welcome(head, body))
            }
            _ => None,
        }
    }

    fn item(&mut self, channel: Channel, item: Item) -> Result<(), PeerFault> {
        match item {
            Item::Message(head, body) => self.message(channel, head, &body),
            Item::Contents(head) => self.state_announced(channel, &head),
            Item::Placed(head) => {
                self.receiver.placed(&head);
                self.check_whole()
            }
            Item::Frame(head, frame) if head.kind == Kind::Input => {
                let first = head.flags & FLAG_FIRST != 0;
                self.outlet.store(head.number, first, frame)
            }
            Item::Frame(head, _) => Err(self.receiver.out_of_phase(head.kind)),
        }
    }

    fn frame_from_guest(&mut self, since: Epoch, frame: Bytes) -> Result<(), Misuse> {
        // Without a replica it is the primary's guest that was here until now.
        let newest = self.base.epoch;
        if self.receiver.is_empty() || !self.outlet.is_said(newest, since, &frame)? {
            return Ok(());
        }
        if !self.base.link.net_is_full(HEAD_LEN + frame.len()) {
            let head = self.base.link.head(Kind::Output, since.0);
            self.base.send(Channel::Net, head, &frame);
        }
        if let Some(queue) = self.outlet.keep(self.base.now, frame) {
            self.base.event(Event::QueueFull(queue));
        }
        Ok(())
    }

    fn guest_done(&mut self, done: GuestDone) {
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

    fn member_output(&mut self, output: MemberOutput) {
        match output {
            MemberOutput::Settle => {
                self.settling = true;
                if self.receiver.loading() {
                    self.base.walk_failover(FailoverStatus::Relaunch);
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
                if self.base.link.any_up() {
                    self.lose_peer(PeerLost::NotOwner, Some("this host boots the VM"));
                }
                self.base.answer_waiting(Until::Alone, Answer::Done);
                // An operator may have made the disk a replica's meanwhile.
                self.base.stop_replication(false);
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

    fn standing(&self) -> Standing {
        Standing {
            replica: !self.receiver.is_empty(),
            ..self.base.standing(Role::Secondary)
        }
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::FailOver { .. } => {
                self.base.begin_failover();
                self.base.local(Local::Operator(MemberCommand::FailOver));
            }
            Act::Leave(why) | Act::Detach(why) => {
                self.dial.set_detached(true);
                let said = match why {
                    Why::Detached => "detached by an operator",
                    Why::Ends => "the secondary ends",
                };
                self.lose_peer(PeerLost::Asked, Some(said));
                self.base.local(Local::ReplicaLost);
            }
            Act::Attach => self.dial.set_detached(false),
            Act::Override => self.base.local(Local::Operator(MemberCommand::Override)),
            // Not ordered of a secondary.
            Act::Checkpoint
            | Act::HandOver
            | Act::Delay(_)
            | Act::Mode(_)
            | Act::Stop
            | Act::Continue => {}
        }
    }

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
            self.dial.worked();
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
        if self.may_dial() && self.dial.begins(now) {
            self.base.push(Output::Dial(Channel::Control));
            return true;
        }
        if let Some(why) = self.dial.late(now) {
            self.lose_peer(why, Some("no welcome in time"));
            return true;
        }
        if let Some(why) = self.base.link.frames_stuck(now) {
            self.lose_peer(why, Some(FRAMES_STUCK));
            return true;
        }
        if self.receiver.awaits()
            && let Some(why) = self.base.stalled(self.receiver.name())
        {
            // Past the commit point only the guest side here can end the wait; it goes on.
            self.base.link.progressed(now);
            self.lose_peer(why, Some("no progress"));
            return true;
        }
        false
    }

    /// The connection is of no use any more. A checkpoint before its commit point leaves no trace;
    /// one after it goes on.
    fn lose_peer(&mut self, why: PeerLost, said: Option<&str>) {
        let had_peer = self.dial.connecting() || self.dial.accepted();
        if let Some(said) = said {
            self.base.send_leave(said);
        }
        let peer = self.base.link.peer;
        self.base.hang_up();
        if self.receiver.loading() {
            // Needed to name the owner when the load ends.
            self.base.link.peer = peer;
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
            self.dial.again(self.base.now, unfit);
        }
        self.base.local(Local::ReplicationDead);
    }
}

impl Machine for Secondary {
    fn channels(&self) -> alloc::vec::Vec<Channel> {
        self.base.config.channels().collect()
    }

    fn handle_input(&mut self, now: Instant, input: Input<'_>) -> Result<(), Misuse> {
        self.handle(now, input)?;
        self.pump();
        Ok(())
    }

    fn poll_output(&mut self) -> Option<Output> {
        self.base.poll_output(self.should_run())
    }

    fn poll_transmit(&mut self, channel: Channel, budget: usize) -> Option<Transmit> {
        if let Some(transmit) = self.base.link.poll_queued(channel, budget) {
            return Some(transmit);
        }
        (channel == Channel::Control).then(|| self.poll_report())?
    }

    fn poll_demand(&mut self, channel: Channel) -> Demand {
        self.base.link.demand(channel)
    }

    fn poll_timeout(&self) -> Option<Deadline> {
        let base = &self.base;
        let dial = self.dial.deadline(self.may_dial());
        let stall = self.receiver.awaits().then(|| base.link.stall());
        let guest = base.guest_ops.deadline(self.should_run());
        base.soonest([dial, stall, guest])
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
