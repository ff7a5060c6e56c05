//! What both roles have: the link, the guest, the member, the queue of outputs. It moves with the
//! VM from one role to the next.

use alloc::{collections::VecDeque, string::String, vec::Vec};
use core::time::Duration;

use crate::{
    command::{Answer, CommandId, Refusal},
    config::Config,
    error::{Misuse, PeerFault},
    event::{Event, PeerLost},
    failover::Failover,
    guest_ops::GuestOps,
    id::{Channel, Epoch, Generation, Role, Slot},
    machine::{
        Deadline, Demand, GuestDone, GuestOp, Input, Notify, Output, ReplicationOp, TimerKind,
        Transmit,
    },
    member::{
        BootId, Command as MemberCommand, Health, Local, MemberEvent, MemberOutput, MemberState,
        Permit, Unprotected,
    },
    output::FRAME_COST,
    ownership::Ownership,
    pairing::link::Link,
    stats::Stats,
    status::{Mode, Status},
    time::Instant,
    wire::{Head, Kind, encode_reasons},
};

/// The part of a machine that outlives a change of role.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Base {
    pub(crate) config: Config,
    pub(crate) boot: BootId,
    pub(crate) now: Instant,
    pub(crate) out: VecDeque<Output>,
    pub(crate) link: Link,
    pub(crate) guest_ops: GuestOps,
    pub(crate) member: Ownership,
    pub(crate) failover: Failover,
    /// Newest epoch captured (primary) or loaded (secondary).
    pub(crate) epoch: Epoch,
    /// The ownership this pairing began under; stamped on every message.
    pub(crate) pairing: Generation,
    /// The peer's process, from its hello.
    pub(crate) peer: Option<BootId>,
    pub(crate) wanted_mode: Mode,
    /// An operator's `stop`.
    pub(crate) stopped: bool,
    /// The guest could not be resumed here.
    pub(crate) broken: bool,
    /// What the driver says of this host.
    health: Health,
    /// When the operation in progress on the guest's side was begun, and whether it hangs.
    begun: Instant,
    hangs: bool,
    /// The guest here has been something: it cannot be booted any more, only gone on with.
    pub(crate) used: bool,
    /// Why a failure would not be survived though both hosts are in step, since when, and whether
    /// that was said.
    risk: Option<(Unprotected, Instant, bool)>,
    /// The member took the VM away from this host.
    pub(crate) fenced: bool,
    /// Control is kept only until what is queued on it was sent, and no longer than this.
    pub(crate) drain_until: Option<Instant>,
    /// When something last moved in the current phase.
    pub(crate) progress: Instant,
    /// When a frame for the peer last moved, if any waits on Net.
    frames: Option<Instant>,
    pub(crate) waiting: Vec<Waiting>,
    pub(crate) stats: Stats,
}

/// A command that is being carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Waiting {
    pub(crate) id: CommandId,
    pub(crate) until: Until,
    /// When whoever waits is told that it has not happened.
    limit: Instant,
}

/// What answers a waiting command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Until {
    /// A checkpoint is complete: of this epoch or a later one.
    Checkpoint(Epoch),
    /// This host owns the VM alone.
    Alone,
    /// The peer owns the VM.
    HandedOver,
    /// The guest is stopped.
    Stopped,
}

/// What a peer is told that does not take frames.
pub(crate) const FRAMES_STUCK: &str = "no frame was taken in time";

/// How long protection may be in doubt before it is said: what passes by itself alarms nobody.
const RISK_LASTS: Duration = Duration::from_secs(1);

/// Most commands in progress at once; more are refused.
const WAITING_MOST: usize = 64;

impl Base {
    pub(crate) fn new(
        config: Config,
        boot: BootId,
        member: impl Into<Ownership>,
        now: Instant,
    ) -> Self {
        Self {
            boot,
            now,
            out: VecDeque::new(),
            link: Link::new(&config),
            guest_ops: GuestOps::new(false),
            member: member.into(),
            failover: Failover::default(),
            epoch: Epoch(0),
            pairing: Generation(0),
            peer: None,
            wanted_mode: config.mode,
            stopped: false,
            broken: false,
            health: Health::Ok,
            begun: now,
            hangs: false,
            used: false,
            risk: None,
            fenced: false,
            drain_until: None,
            progress: now,
            frames: None,
            waiting: Vec::new(),
            stats: Stats::default(),
            config,
        }
    }

    // ---- outputs ------------------------------------------------------------------------------

    pub(crate) fn push(&mut self, output: Output) {
        self.out.push_back(output);
    }

    pub(crate) fn event(&mut self, event: Event) {
        tracing::debug!(?event);
        self.out.push_back(Output::Event(event));
    }

    pub(crate) fn notify(&mut self, notify: Notify) {
        self.out.push_back(Output::Notify(notify));
    }

    pub(crate) fn answer(&mut self, id: CommandId, answer: Answer) {
        self.out.push_back(Output::Answer(id, answer));
    }

    pub(crate) fn refuse(&mut self, id: CommandId, why: Refusal) {
        self.answer(id, Answer::Refused(why));
    }

    /// `xen-set-replication`, which means the same in both roles.
    pub(crate) fn xen_set_replication(
        &mut self,
        id: CommandId,
        enable: bool,
        role: Role,
        failover: Option<bool>,
    ) {
        let op = match (enable, failover) {
            (true, Some(_)) => return self.refuse(id, Refusal::FailoverOnlyForStop),
            (true, None) => ReplicationOp::Start(role),
            (false, failover) => ReplicationOp::Stop {
                failover: failover.unwrap_or(false),
            },
        };
        self.replicate(id, op);
    }

    /// Does what an operator wants of block replication.
    pub(crate) fn replicate(&mut self, id: CommandId, op: ReplicationOp) {
        if self.guest_ops.asked_for() >= WAITING_MOST {
            return self.refuse(id, Refusal::InProgress);
        }
        self.guest_ops.push(GuestOp::Replication(op), Some(id));
    }

    /// What an operator wanted of the guest's side ended. Nothing else hangs on it.
    pub(crate) fn operated(&mut self, id: CommandId, done: GuestDone) {
        match done {
            GuestDone::Failed { op, why } => {
                self.event(Event::GuestFailed { op, why });
                self.refuse(id, Refusal::GuestFailed);
            }
            _ => self.answer(id, Answer::Done),
        }
    }

    /// Answers `stop`, if the guest is stopped.
    pub(crate) fn answer_stopped(&mut self) {
        if self.guest_ops.idle_and_stopped() {
            self.answer_waiting(Until::Stopped, Answer::Done);
        }
    }

    /// The guest could not be resumed, or may be able to after all. It is not tried again by itself:
    /// that would not end.
    pub(crate) fn set_broken(&mut self, broken: bool) {
        if core::mem::replace(&mut self.broken, broken) != broken {
            self.report_health();
        }
    }

    /// An operation that takes too long is this host's own fault, and nobody else's: the VM goes to
    /// the other host, if that could run it.
    fn watch_guest(&mut self) {
        let limit = self.config.member.longest_operation();
        let slow = self.now.since(self.begun) >= limit;
        let hangs = self.guest_ops.busy().filter(|_| slow);
        if core::mem::replace(&mut self.hangs, hangs.is_some()) != hangs.is_some() {
            if let Some(op) = hangs {
                self.event(Event::GuestHangs(op));
            }
            self.report_health();
        }
    }

    /// No command waits for ever, whatever it waits for.
    fn end_waiting(&mut self) {
        let now = self.now;
        for waiting in core::mem::take(&mut self.waiting) {
            if now < waiting.limit {
                self.waiting.push(waiting);
            } else {
                self.refuse(waiting.id, Refusal::TookTooLong);
            }
        }
    }

    /// Says once why a failure would not be survived, if that lasts.
    fn watch_risk(&mut self) {
        let why = self
            .member
            .unprotected(self.now)
            .filter(|why| !matches!(why, Unprotected::Unpaired(_)));
        match (why, self.risk) {
            (Some(why), Some((before, since, said))) if why == before => {
                if !said && self.now.since(since) >= RISK_LASTS {
                    self.risk = Some((why, since, true));
                    self.event(Event::AtRisk(Some(why)));
                }
            }
            (Some(why), _) => self.risk = Some((why, self.now, false)),
            (None, Some((.., said))) => {
                self.risk = None;
                if said {
                    self.event(Event::AtRisk(None));
                }
            }
            (None, None) => {}
        }
    }

    /// Whether this host could run the VM.
    pub(crate) fn is_fit(&self) -> bool {
        !self.broken && !self.hangs && self.health != Health::Fatal
    }

    fn report_health(&mut self) {
        let health = if self.broken || self.hangs {
            Health::Fatal
        } else {
            self.health
        };
        self.local(Local::Health(health));
    }

    /// Remembers a command; refuses it if too many are being carried out.
    pub(crate) fn wait(&mut self, id: CommandId, until: Until) {
        if self.waiting.len() >= WAITING_MOST {
            return self.refuse(id, Refusal::InProgress);
        }
        let limit = self.now + self.config.stall * 3;
        self.waiting.push(Waiting { id, until, limit });
    }

    /// Answers every command that waited for this.
    pub(crate) fn answer_waiting(&mut self, until: Until, answer: Answer) {
        self.answer_all(|waits| waits == until, answer);
    }

    /// Answers every command that waits for a checkpoint up to this.
    pub(crate) fn answer_checkpoint(&mut self, epoch: Epoch, answer: Answer) {
        self.answer_all(
            |waits| matches!(waits, Until::Checkpoint(least) if least <= epoch),
            answer,
        );
    }

    /// Whether a command waits for a checkpoint after this.
    pub(crate) fn awaits_checkpoint_after(&self, epoch: Epoch) -> bool {
        self.waiting
            .iter()
            .any(|w| matches!(w.until, Until::Checkpoint(least) if least > epoch))
    }

    pub(crate) fn waits(&self, until: Until) -> bool {
        self.waiting.iter().any(|w| w.until == until)
    }

    fn answer_all(&mut self, is: impl Fn(Until) -> bool, answer: Answer) {
        for waiting in core::mem::take(&mut self.waiting) {
            if is(waiting.until) {
                self.answer(waiting.id, answer);
            } else {
                self.waiting.push(waiting);
            }
        }
    }

    /// The next output: decisions first, then the guest's run state. Frames come after it.
    pub(crate) fn poll_output(&mut self, should_run: bool) -> Option<Output> {
        if let Some(output) = self.out.pop_front() {
            return Some(output);
        }
        let op = self.guest_ops.poll(should_run)?;
        self.begun = self.now;
        self.used |= matches!(op, GuestOp::Resume | GuestOp::CommitRam { .. });
        Some(Output::Guest(op))
    }

    /// Until when frames may leave, if they may.
    pub(crate) fn permit(&self) -> Option<Permit> {
        self.member.permit(self.now)
    }

    /// Whether everything was drained: the contract of [`Machine`](crate::machine::Machine).
    pub(crate) fn drained(&self) -> bool {
        self.out.is_empty()
    }

    // ---- messages -----------------------------------------------------------------------------

    pub(crate) fn head(&self, kind: Kind, number: u64) -> Head {
        Head::new(kind, self.pairing, number)
    }

    pub(crate) fn send(&mut self, channel: Channel, head: Head, body: &[u8]) {
        self.link.send(channel, head.with_body(body));
        if channel == Channel::Net && self.link.is_up(channel) {
            self.frames.get_or_insert(self.now);
        }
    }

    /// Whether so many bytes more would wait for the peer on Net, which may not read for a while.
    pub(crate) fn net_is_full(&self, more: usize) -> bool {
        self.link.held(Channel::Net) + more + FRAME_COST > self.config.hold_bytes
    }

    pub(crate) fn send_control(&mut self, kind: Kind, number: u64) {
        let head = self.head(kind, number);
        self.send(Channel::Control, head, &[]);
    }

    /// Tells the peer why it is left, as far as it can still be told.
    pub(crate) fn send_leave(&mut self, why: &str) {
        let body = encode_reasons(&[String::from(why)]);
        let head = self.head(Kind::Leave, 0);
        self.send(Channel::Control, head, &body);
    }

    pub(crate) fn refuse_peer(&mut self, reasons: Vec<String>) {
        let body = encode_reasons(&reasons);
        let head = self.head(Kind::Refuse, 0);
        self.send(Channel::Control, head, &body);
        self.event(Event::PeerRefused { reasons });
    }

    /// A message of another ownership has nothing to say here.
    pub(crate) fn check_generation(&self, head: &Head) -> Result<(), PeerFault> {
        if head.generation == self.pairing {
            return Ok(());
        }
        Err(PeerFault::OtherGeneration {
            message: head.kind.name(),
            got: head.generation,
            expected: self.pairing,
        })
    }

    /// Closes every channel, sending first what is queued on Control.
    ///
    /// A driver stops asking for bytes once it is told to hang up, so Control goes only when its
    /// last message was taken, or when the link has shown that it takes nothing.
    pub(crate) fn hang_up(&mut self) {
        for channel in self.link.up_channels() {
            if channel == Channel::Control && self.link.queued(channel) > 0 {
                self.drain_until = Some(self.now + self.config.handshake);
                continue;
            }
            self.push(Output::HangUp(channel));
            let _known = self.link.down(channel);
        }
        self.peer = None;
        self.frames = None;
    }

    /// Closes Control when its last message was taken, or cannot be.
    fn end_draining(&mut self) {
        let Some(until) = self.drain_until else {
            return;
        };
        if self.now >= until || self.link.is_flushed(Channel::Control) {
            self.drain_until = None;
            self.push(Output::HangUp(Channel::Control));
            let _known = self.link.down(Channel::Control);
        }
    }

    /// Whether what arrives on the channel has no meaning any more: it is only kept until its
    /// last message was taken.
    pub(crate) fn draining(&self, channel: Channel) -> bool {
        self.drain_until.is_some() && channel == Channel::Control
    }

    /// A connection begins; the draining of an older one is void.
    pub(crate) fn connected(&mut self, channel: Channel) -> Result<(), Misuse> {
        self.drain_until = self.drain_until.filter(|_| channel != Channel::Control);
        self.link.up(channel)
    }

    /// A connection ended.
    pub(crate) fn disconnected(&mut self, channel: Channel) -> Result<(), Misuse> {
        self.drain_until = self.drain_until.filter(|_| channel != Channel::Control);
        self.link.down(channel)
    }

    pub(crate) fn demand(&self, channel: Channel) -> Demand {
        if self.draining(channel) {
            return Demand::Pause;
        }
        self.link.demand(channel)
    }

    pub(crate) fn poll_queued(&mut self, channel: Channel, budget: usize) -> Option<Transmit> {
        let transmit = self.link.poll_queued(channel, budget)?;
        self.link.handed_out(channel, &transmit);
        Some(transmit)
    }

    // ---- inputs that mean the same in both roles --------------------------------------------

    /// Handles what needs no role. Gives back what does.
    pub(crate) fn handle_common<'a>(
        &mut self,
        now: Instant,
        input: Input<'a>,
    ) -> Result<Option<Input<'a>>, Misuse> {
        self.now = self.now.max(now);
        match input {
            Input::Timeout => {
                self.watch_guest();
                self.member.handle_timeout(self.now);
                self.watch_risk();
                self.end_waiting();
                self.end_draining();
                Ok(Some(Input::Timeout))
            }
            Input::Datagram(path, bytes) => {
                self.member.handle_datagram(self.now, path, bytes);
                Ok(None)
            }
            Input::Arbiter(request, verdict) => {
                self.member.handle_arbiter(self.now, request, verdict);
                Ok(None)
            }
            Input::Persisted(id) => {
                self.member.handle_persisted(self.now, id);
                Ok(None)
            }
            Input::Fenced(ok) => {
                self.member.handle_fence(self.now, ok);
                Ok(None)
            }
            Input::Health(health) => {
                self.health = health;
                self.report_health();
                Ok(None)
            }
            Input::Progress(n) => {
                self.local(Local::Progress(n));
                Ok(None)
            }
            Input::Sent(channel, n) => {
                self.link.sent(channel, n)?;
                self.end_draining();
                if channel == Channel::Net {
                    let waits = !self.link.is_flushed(channel);
                    self.frames = waits.then_some(self.now);
                }
                self.moved(channel);
                Ok(None)
            }
            Input::Bytes(channel, _) | Input::Placed(channel, _) | Input::Frame(channel, _)
                if self.draining(channel) =>
            {
                Ok(None)
            }
            other => Ok(Some(other)),
        }
    }

    pub(crate) fn local(&mut self, local: Local) {
        self.member.handle_local(self.now, local);
    }

    /// Member outputs that mean the same in both roles. Gives back those that do not.
    pub(crate) fn member_output(&mut self, output: MemberOutput) -> Option<MemberOutput> {
        match output {
            MemberOutput::Send { path, bytes } => self.push(Output::Datagram(path, bytes)),
            MemberOutput::Cas(ballot) => self.push(Output::AskArbiter(ballot)),
            MemberOutput::ReadRegister { request } => self.push(Output::ReadArbiter(request)),
            MemberOutput::Fence { delay } => self.push(Output::Fence(delay)),
            MemberOutput::Persist { id, record } => self.push(Output::Persist(id, record)),
            MemberOutput::Announce => self.push(Output::Announce),
            MemberOutput::Event(event) => {
                match event {
                    MemberEvent::Refused { command, state } => {
                        self.member_refused(command, state);
                    }
                    MemberEvent::NotHandedOver(why) => {
                        let refused = Answer::Refused(Refusal::AtRisk(why));
                        self.answer_waiting(Until::HandedOver, refused);
                    }
                    // The owner was first, and the pair goes on.
                    MemberEvent::State {
                        from: MemberState::SecondaryArbitrating,
                        to: MemberState::Secondary,
                        ..
                    } => {
                        self.failover.withdraw();
                        let kept = Answer::Refused(Refusal::NotOwner);
                        self.answer_waiting(Until::Alone, kept);
                    }
                    _ => {}
                }
                self.event(Event::Member(event));
            }
            // A permit is asked for at every frame.
            MemberOutput::Gate(_) => {}
            MemberOutput::PauseVm => {
                self.fenced = true;
                // A secondary that was granted the VM pauses too, until it is its turn; and a hand-over
                // that an operator asked for alarms nobody.
                if !self.waits(Until::HandedOver)
                    && !matches!(
                        self.member.state(),
                        MemberState::TakeoverWait | MemberState::PrimarySolo
                    )
                {
                    self.event(Event::Fenced(self.member.generation()));
                }
                return Some(MemberOutput::PauseVm);
            }
            MemberOutput::ResumeVm => self.fenced = false,
            other => return Some(other),
        }
        None
    }

    /// Who waits for a command that the member does not carry out is told so.
    fn member_refused(&mut self, command: MemberCommand, state: MemberState) {
        let until = match command {
            MemberCommand::FailOver => {
                self.failover.withdraw();
                Until::Alone
            }
            MemberCommand::Detach | MemberCommand::Override => Until::Alone,
            MemberCommand::Yield => Until::HandedOver,
            _ => return,
        };
        self.answer_waiting(until, Answer::Refused(Refusal::Ownership(state)));
    }

    /// What both roles report alike.
    pub(crate) fn status(&self) -> Status {
        Status {
            role: Role::Secondary,
            protected: false,
            unprotected: self.member.unprotected(self.now),
            colo_mode: self.failover.mode,
            last_mode: self.failover.last_mode,
            reason: self.failover.reason(),
            failover: self.failover.status,
            mode: Mode::default(),
            phase: "",
            epoch: self.epoch,
            generation: self.member.generation(),
            member: self.member.state(),
            checkpoint_delay: self.config.longest,
            stopped: self.stopped || self.broken,
            replica_valid: false,
        }
    }

    // ---- time ---------------------------------------------------------------------------------

    /// The earliest of the deadlines of both roles and those given.
    pub(crate) fn soonest(
        &self,
        others: impl IntoIterator<Item = Option<Deadline>>,
    ) -> Option<Deadline> {
        let member = self.member.poll_timeout().map(|at| Deadline {
            at,
            why: TimerKind::Member,
        });
        let draining = self.drain_until.map(|at| Deadline {
            at,
            why: TimerKind::Handshake,
        });
        let frames = self.frames.map(|since| Deadline {
            at: since + self.config.stall,
            why: TimerKind::Stall,
        });
        others
            .into_iter()
            .chain([member, draining, frames])
            .flatten()
            .min_by_key(|d| d.at)
    }

    /// Something moved. Frames of clients do not count: no phase waits for them.
    pub(crate) fn moved(&mut self, channel: Channel) {
        if channel != Channel::Net {
            self.progress = self.now;
        }
    }

    /// The deadline of a phase that must move.
    pub(crate) fn stall(&self) -> Deadline {
        Deadline {
            at: self.progress + self.config.stall,
            why: TimerKind::Stall,
        }
    }

    ///
    /// The peer is not blamed for what the guest's side here does not finish.
    pub(crate) fn stalled(&self, state: &'static str) -> Option<PeerLost> {
        let waited = self.now.since(self.progress);
        (waited >= self.config.stall && self.guest_ops.busy().is_none())
            .then_some(PeerLost::Faulty(PeerFault::Stalled { state, waited }))
    }

    /// Whether frames have waited on Net for too long, however lively the other channels are. What is
    /// full drops every client frame, and no phase would end it.
    pub(crate) fn frames_stuck(&self) -> Option<PeerLost> {
        let stall = self.config.stall;
        let since = self.frames?;
        (self.now.since(since) >= stall).then_some(PeerLost::TooSlow(stall))
    }

    /// Whether the slot is one of ours; dirty words of others are misuse.
    pub(crate) fn check_slot(&self, slot: Slot) -> Result<(), Misuse> {
        if self.config.slots.iter().any(|s| s.0 == slot) {
            return Ok(());
        }
        Err(Misuse::UnknownSlot(slot))
    }

    pub(crate) fn op(&mut self, op: GuestOp) {
        self.guest_ops.push(op, None);
    }
}
