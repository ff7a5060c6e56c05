//! Asking: a ballot, a read or a power-off, repeated until there is a definite answer (O6), and
//! never before the intention is durable (O7).

use core::time::Duration;

use super::{
    Arbitration, Ballot, Claim, Member, MemberEvent, MemberOutput, Mode, NodeId, PersistId,
    PriorRole, Register, RequestId, Verdict, mutation::broken, phase::Phase,
};
use crate::{id::Generation, time::Instant};

/// First and last pause between attempts.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));
/// How much later than a primary a secondary shoots, before jitter.
const FENCE_DELAY: Duration = Duration::from_secs(2);
/// One attempt at fencing.
const FENCE_ATTEMPT: Duration = Duration::from_secs(60);

/// The one question that is open.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Inquiry {
    pub(super) ask: Ask,
    step: Step,
    backoff: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Ask {
    Read(RequestId),
    Cast(Ballot),
    /// Power the peer off; then the ballot counts as granted.
    Fence(Ballot, Duration),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    /// Waits for a write.
    Durable(PersistId),
    /// Asked; counts as unanswered from then on.
    Asked(Instant),
    /// Asks again then.
    Pause(Instant),
}

impl Inquiry {
    /// The ballot that may already have been, or yet be, applied.
    pub(super) const fn ballot(&self) -> Option<&Ballot> {
        match &self.ask {
            Ask::Cast(ballot) | Ask::Fence(ballot, _) => Some(ballot),
            Ask::Read(_) => None,
        }
    }

    const fn request(&self) -> Option<RequestId> {
        match &self.ask {
            Ask::Read(request) => Some(*request),
            Ask::Cast(ballot) => Some(ballot.request),
            Ask::Fence(..) => None,
        }
    }
}

impl Member {
    /// Asks for the generation after `expect`: persists the intention, and casts the ballot once
    /// that is durable. Without an arbiter, the grant is a power-off or nobody's.
    pub(super) fn claim(
        &mut self,
        now: Instant,
        from: PriorRole,
        expect: Generation,
        mode: Mode,
        owner: NodeId,
    ) {
        let partner = match mode {
            Mode::Dual => self.config.peer,
            Mode::Solo => NodeId(0),
        };
        let ballot = Ballot {
            request: RequestId(self.random()),
            caller: self.me,
            expect,
            mode,
            owner,
            partner,
            force: false,
        };
        let after = self.persist(Claim::Arbitrating { ballot, from });
        self.cast(now, ballot, from, after);
    }

    /// Casts a ballot once `after` is durable.
    pub(super) fn cast(&mut self, now: Instant, ballot: Ballot, from: PriorRole, after: PersistId) {
        let ask = match (self.config.arbitration, ballot.mode) {
            (Arbitration::Arbiter { .. }, _) => Ask::Cast(ballot),
            (Arbitration::Fence, Mode::Solo) if self.must_fence(&ballot) => {
                let delay = match from {
                    PriorRole::DualPartner => {
                        FENCE_DELAY + Duration::from_millis(self.random() % 1000)
                    }
                    PriorRole::DualOwner | PriorRole::Solo => Duration::ZERO,
                };
                Ask::Fence(ballot, delay)
            }
            // A generation that nobody else can ask for needs nobody's grant; whether acting on
            // silence without an arbiter is allowed, the caller has checked.
            (Arbitration::Fence | Arbitration::None { .. }, _) => {
                self.learn(now, ballot.outcome());
                return;
            }
        };
        self.inquiry = Some(Inquiry {
            ask,
            step: Step::Durable(after),
            backoff: BACKOFF.0,
        });
        self.pump_inquiry(now);
    }

    /// Without an arbiter: who gave up, or was never there, need not be shot.
    fn must_fence(&self, ballot: &Ballot) -> bool {
        let waived = matches!(&self.phase, Phase::SecondaryArbitrating(bid) if bid.waived);
        ballot.expect > Generation(0) && !waived
    }

    /// Takes the next step of the open question, if it is due.
    pub(super) fn pump_inquiry(&mut self, now: Instant) {
        let attempt = self.config.arbiter_attempt;
        let jitter = self.random_jitter_if_due(now);
        let early = broken!(self, BallotBeforeDurable);
        let forget = broken!(self, ForgetBallot);
        let durable = |member: &Self, id| member.is_durable(id) || early;
        let Some(step) = self.inquiry.as_ref().map(|i| i.step) else {
            return;
        };
        match step {
            Step::Durable(id) if durable(self, id) => self.issue(now, attempt),
            Step::Pause(at) if now >= at => self.issue(now, attempt),
            Step::Asked(until) if now >= until => {
                if forget && matches!(self.phase, Phase::SecondaryArbitrating(_)) {
                    self.forget_bid(now);
                    return;
                }
                self.pause(now, jitter);
            }
            Step::Durable(_) | Step::Pause(_) | Step::Asked(_) => {}
        }
    }

    fn random_jitter_if_due(&mut self, now: Instant) -> Duration {
        match self.inquiry.as_ref().map(|i| i.step) {
            Some(Step::Asked(until)) if now >= until => {
                Duration::from_micros(self.random() % 50_000)
            }
            _ => Duration::ZERO,
        }
    }

    fn issue(&mut self, now: Instant, attempt: Duration) {
        let Some(inquiry) = &mut self.inquiry else {
            return;
        };
        let (output, patience) = match &mut inquiry.ask {
            Ask::Read(request) => (MemberOutput::ReadRegister { request: *request }, attempt),
            Ask::Cast(ballot) => (MemberOutput::Cas(*ballot), attempt),
            Ask::Fence(_, delay) => {
                let delay = core::mem::take(delay);
                (MemberOutput::Fence { delay }, FENCE_ATTEMPT + delay)
            }
        };
        inquiry.step = Step::Asked(now + patience);
        self.push(output);
    }

    fn pause(&mut self, now: Instant, jitter: Duration) {
        if let Some(inquiry) = &mut self.inquiry {
            inquiry.step = Step::Pause(now + inquiry.backoff + jitter);
            inquiry.backoff = (inquiry.backoff * 2).min(BACKOFF.1);
        }
    }

    pub(super) fn inquiry_deadline(&self) -> Option<Instant> {
        match self.inquiry.as_ref()?.step {
            Step::Durable(_) => None,
            Step::Asked(at) | Step::Pause(at) => Some(at),
        }
    }

    /// An answer. A register of a generation that the open ballot already supposes says nothing.
    pub(super) fn answered(&mut self, now: Instant, request: RequestId, verdict: Verdict) {
        let ours = self.inquiry.as_ref().and_then(Inquiry::request) == Some(request);
        let register = match verdict {
            Verdict::Granted(r) | Verdict::Denied(r) | Verdict::Read(r) => r,
            Verdict::Unreachable => {
                if ours && matches!(self.inquiry.as_ref().map(|i| i.step), Some(Step::Asked(_))) {
                    let jitter = Duration::from_micros(self.random() % 50_000);
                    self.pause(now, jitter);
                }
                return;
            }
        };
        // A partner's generation came from the arbiter: one that does not know of it is another one, or
        // has lost its register. Neither could ever make this host the owner.
        let known = match self.phase {
            Phase::Secondary(_) | Phase::Dual(_) => self.journal.record.seen.max(self.generation),
            _ => self.journal.record.seen,
        };
        if register.generation < known {
            self.witness.foreign = true;
            if ours {
                self.event(MemberEvent::ArbiterWentBack {
                    got: register.generation,
                    known,
                });
                self.pause(now, Duration::ZERO);
            }
            return;
        }
        self.witness.answered(now);
        if matches!(verdict, Verdict::Read(_)) {
            self.witness.read(now, request, register.mark);
            self.note_read(request);
        }
        if self.is_grant_of_peer(&register) {
            self.witness.met(now);
        }
        self.journal.record.seen = register.generation;
        let supposed = self
            .inquiry
            .as_ref()
            .and_then(Inquiry::ballot)
            .is_some_and(|b| register.generation <= b.expect);
        // A denial at the very generation expected is definite: it is not ours to ask for.
        let refused = ours && matches!(verdict, Verdict::Denied(_));
        if supposed && !refused {
            if ours {
                self.pause(now, Duration::ZERO);
            }
            return;
        }
        if ours || self.inquiry.as_ref().is_some_and(|i| i.ballot().is_some()) {
            self.inquiry = None;
        }
        self.learn(now, register);
        self.say_prepared(now);
        self.yield_if_prepared(now);
    }

    /// Fencing was tried.
    pub(super) fn fenced_peer(&mut self, now: Instant, ok: bool) {
        if ok {
            self.waive();
        }
        let Some(Inquiry {
            ask: Ask::Fence(ballot, _),
            step: Step::Asked(_),
            ..
        }) = self.inquiry
        else {
            return;
        };
        if ok {
            self.inquiry = None;
            self.learn(now, ballot.outcome());
        } else {
            self.pause(now, Duration::ZERO);
            self.stand_down(now);
        }
    }

    /// Acts on the current register, by state.
    pub(super) fn learn(&mut self, now: Instant, register: Register) {
        match self.phase {
            Phase::Idle(_) => self.learn_idle(now, register),
            Phase::Syncing(_) => self.learn_syncing(now, register),
            Phase::Secondary(_) => {}
            Phase::Dual(_) | Phase::PrimaryArbitrating(_) => self.learn_paired(now, register),
            Phase::Solo(_) => self.learn_solo(now, register),
            Phase::SecondaryArbitrating(_) => self.learn_bid(now, register),
            Phase::TakeoverWait(_) => self.learn_wait(register),
            Phase::Fenced(_) => self.learn_fenced(now, register),
        }
    }

    /// Reads the register now and then: for the flag that the partner sees the arbiter, and for
    /// states that wait for it to change.
    pub(super) fn watch_arbiter(&mut self, now: Instant) {
        if !matches!(self.config.arbitration, Arbitration::Arbiter { .. }) {
            return;
        }
        if now >= self.witness.next && self.inquiry.is_none() {
            let _mark = self.read_register(now);
        }
        let silence = self.config.witness_silence;
        if now.since(self.witness.heard) >= silence && now.since(self.witness.alarm) >= silence {
            self.witness.alarm = now;
            self.event(MemberEvent::ArbiterSilent);
        }
    }

    pub(super) fn read_register(&mut self, now: Instant) -> RequestId {
        self.witness.next = now + self.probe_period();
        let request = RequestId(self.random());
        self.inquiry = Some(Inquiry {
            ask: Ask::Read(request),
            step: Step::Durable(PersistId(0)),
            backoff: BACKOFF.0,
        });
        self.pump_inquiry(now);
        request
    }

    /// Whether the register holds the pairing that this node is in, which the owner wrote.
    fn is_grant_of_peer(&self, register: &Register) -> bool {
        matches!(self.phase, Phase::Secondary(_))
            && self.witness.is_new_to_peer()
            && (register.generation, register.owner, register.partner)
                == (self.generation, self.config.peer, self.me)
    }

    pub(super) const fn has_arbiter(&self) -> bool {
        matches!(self.config.arbitration, Arbitration::Arbiter { .. })
    }
}
