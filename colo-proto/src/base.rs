//! What both roles have: the link, the guest, the member, the queue of outputs. It moves with the
//! VM from one role to the next.

use alloc::{collections::VecDeque, string::String, vec::Vec};
use core::time::Duration;

use crate::{
    command::{Answer, CommandId, Refusal},
    config::Config,
    error::Misuse,
    event::{Cause, Event, PeerLost},
    failover::Failover,
    guest_ops::GuestOps,
    id::{Channel, Epoch, Role, Slot},
    machine::{Deadline, GuestDone, GuestOp, Input, Notify, Output, ReplicationOp, TimerKind},
    member::{
        BootId, Command as MemberCommand, Health, Local, MemberEvent, MemberOutput, MemberState,
        Permit, Unprotected,
    },
    operator::{Standing, Until, WAITING_MOST, Waiters},
    output::News,
    ownership::Ownership,
    pairing::Link,
    protection::Protection,
    stats::Stats,
    status::{ColoMode, FailoverStatus, Mode, Status},
    time::Instant,
    wire::{HEAD_LEN, Head, Kind},
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
    waiting: Waiters,
    pub(crate) stats: Stats,
}

/// How long protection may be in doubt before it is said: what passes by itself alarms nobody.
const RISK_LASTS: Duration = Duration::from_secs(1);

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
            link: Link::new(&config, now),
            guest_ops: GuestOps::new(false),
            member: member.into(),
            failover: Failover::default(),
            epoch: Epoch(0),
            wanted_mode: config.mode,
            stopped: false,
            broken: false,
            health: Health::Ok,
            begun: now,
            hangs: false,
            used: false,
            risk: None,
            fenced: false,
            waiting: Waiters::default(),
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

    /// The guest could not be stopped: who wanted it is told, and it is not stopped behind their back.
    pub(crate) fn refuse_stop(&mut self) {
        if self.waits(Until::Stopped) {
            self.stopped = false;
            self.answer_waiting(Until::Stopped, Answer::Refused(Refusal::GuestFailed));
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
        while let Some(id) = self.waiting.overdue(self.now) {
            self.refuse(id, Refusal::TookTooLong);
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

    /// Remembers a command that is answered later. False if too many wait: it was refused.
    pub(crate) fn wait(&mut self, id: CommandId, until: Until) -> bool {
        let limit = self.now + self.config.stall * 3;
        let room = self.waiting.wait(id, until, limit);
        if !room {
            self.refuse(id, Refusal::InProgress);
        }
        room
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
            .any(|waits| matches!(waits, Until::Checkpoint(least) if least > epoch))
    }

    pub(crate) fn waits(&self, until: Until) -> bool {
        self.waiting.any(|waits| waits == until)
    }

    fn answer_all(&mut self, is: impl Fn(Until) -> bool, answer: Answer) {
        while let Some(id) = self.waiting.take(&is) {
            self.answer(id, answer);
        }
    }

    /// The next output: decisions first, then the guest's run state. Frames come after it.
    pub(crate) fn poll_output(&mut self, should_run: bool) -> Option<Output> {
        if let Some(output) = self.out.pop_front() {
            return Some(output);
        }
        let op = self.guest_ops.poll(self.now, should_run)?;
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

    pub(crate) fn send(&mut self, channel: Channel, head: Head, body: &[u8]) {
        self.link.send(self.now, channel, head, body);
    }

    pub(crate) fn send_control(&mut self, kind: Kind, number: u64) {
        let head = self.link.head(kind, number);
        self.send(Channel::Control, head, &[]);
    }

    /// Tells the peer why it is left, as far as it can still be told.
    pub(crate) fn send_leave(&mut self, why: &str) {
        let why = [String::from(why)];
        self.link.send_reasons(self.now, Kind::Leave, &why);
    }

    pub(crate) fn refuse_peer(&mut self, reasons: Vec<String>) {
        self.link.send_reasons(self.now, Kind::Refuse, &reasons);
        self.event(Event::PeerRefused { reasons });
    }

    /// Closes every channel, sending first what is queued on Control.
    pub(crate) fn hang_up(&mut self) {
        for channel in self.link.hang_up(self.now) {
            self.push(Output::HangUp(channel));
        }
    }

    /// Closes Control when its last message was taken, or cannot be.
    fn end_draining(&mut self) {
        if self.link.has_drained(self.now) {
            self.push(Output::HangUp(Channel::Control));
        }
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
                self.link.sent(self.now, channel, n)?;
                self.end_draining();
                Ok(None)
            }
            Input::Bytes(channel, _) | Input::Placed(channel, _) | Input::Frame(channel, _)
                if self.link.is_draining(channel) =>
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
            MemberCommand::Override => Until::Alone,
            MemberCommand::Detach => Until::Left,
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
        others
            .into_iter()
            .chain(self.link.deadlines())
            .chain([member])
            .flatten()
            .min_by_key(|d| d.at)
    }

    /// Whether a phase that must move has stood still for too long. Waiting for the guest's side here
    /// is not waiting for the peer, which is not blamed for it: its time begins afterwards.
    pub(crate) fn stalled(&mut self, state: &'static str) -> Option<PeerLost> {
        if self.guest_ops.busy().is_some() {
            self.link.progressed(self.now);
            return None;
        }
        self.link.stalled(self.now, state)
    }

    /// What both roles say of themselves to an operator's command.
    pub(crate) fn standing(&self, role: Role) -> Standing {
        Standing {
            role,
            protection: Protection::None,
            replica: false,
            paired: self.failover.mode != ColoMode::None,
            failing_over: self.failover.status != FailoverStatus::None,
            handing_over: self.waits(Until::HandedOver),
            stopped: self.stopped,
            told: self.member.is_told(),
            member: self.member.state(),
            next: self.epoch.next(),
        }
    }

    /// Passes on what an outlet has to say, except that a checkpoint is wanted.
    pub(crate) fn pass_on(&mut self, news: News) -> Option<Cause> {
        if let Some(queue) = news.full {
            self.event(Event::QueueFull(queue));
        }
        // The count is a total: one that is left out is made good by the next.
        if let Some((epoch, left)) = news.left
            && !self.link.net_is_full(HEAD_LEN)
        {
            let mut head = self.link.head(Kind::Released, epoch.0);
            head.count = u32::try_from(left).unwrap_or(u32::MAX);
            self.send(Channel::Net, head, &[]);
        }
        news.wants
    }

    /// COLO is left, after a failover or without one.
    pub(crate) fn leave_colo(&mut self, failed_over: bool) {
        if failed_over && self.failover.mode != ColoMode::None {
            self.walk_failover(FailoverStatus::Completed);
        }
        if let Some(exit) = self.failover.leave() {
            self.event(Event::ColoExit(exit));
        }
        if !failed_over {
            self.failover.withdraw();
        }
    }

    /// Walks the failover status to `to`, saying each state passed on the way.
    pub(crate) fn walk_failover(&mut self, to: FailoverStatus) {
        let out = &mut self.out;
        self.failover
            .advance(to, |s| out.push_back(Output::Event(Event::Failover(s))));
    }

    /// Protection ends on this host's guest side.
    pub(crate) fn stop_replication(&mut self, failover: bool) {
        self.op(GuestOp::Replication(ReplicationOp::Stop { failover }));
    }

    /// A failover that an operator asked for begins.
    pub(crate) fn begin_failover(&mut self) {
        self.failover.request();
        self.event(Event::Failover(FailoverStatus::Require));
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
