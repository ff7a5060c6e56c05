//! The partner's rows: 1 loading, 2 ready, 6 asking, 7 granted and waiting.

use super::{
    Arbitration, BootId, Claim, Control, Critical, Datagram, Health, Kind, Member, MemberEvent,
    MemberOutput, MemberState, Mode, PersistId, PriorRole, Register,
    mutation::broken,
    phase::{Candidate, Fenced, Opening, Phase, Syncing, Wait, Watch},
};
use crate::{id::Epoch, time::Instant};

impl Member {
    /// Routes a control.
    pub(super) fn control(&mut self, now: Instant, control: Control, d: &Datagram) {
        match control {
            Control::Hello => self.peer_idle(d),
            Control::DualStart => self.dual_start(now, d),
            Control::DualAck => self.dual_acknowledged(d),
            Control::Yield => self.yielded(now, d),
            Control::Abstain => self.partner_abstained(now, d),
            Control::DropRequest => self.drop_request(now, d),
            Control::SoloNotice => self.solo_notice(now, d),
            Control::Arbitrating => {}
            Control::Prepare => self.prepare(now, d),
            Control::Prepared => self.prepared(now, d),
        }
    }

    /// 2: acknowledge on every path. A number seen before is acknowledged too but proves nothing
    /// about the owner being there now.
    pub(super) fn heartbeat(&mut self, now: Instant, d: &Datagram) {
        let fit = self.health != Health::Fatal && !self.is_hanging();
        let ours = d.generation == self.generation && d.peer_boot == self.boot;
        let unheard_after = self.config.primary_silence;
        let after_ballot = broken!(self, AckAfterBallot);
        let durable = match &self.phase {
            Phase::Secondary(w) => self.is_durable(w.after),
            Phase::SecondaryArbitrating(_) => after_ballot,
            _ => false,
        };
        let mut unheard = false;
        match &mut self.phase {
            Phase::Secondary(w) if ours && d.boot == w.owner => {
                if d.seq > w.seq {
                    w.seq = d.seq;
                    w.last_heartbeat = now;
                }
                if d.ack > w.heard.0 || d.ack == 0 {
                    w.heard = (d.ack, now);
                    w.unheard = false;
                } else if now.since(w.heard.1) >= unheard_after {
                    unheard = !core::mem::replace(&mut w.unheard, true);
                }
                if durable && fit {
                    // Before it leaves: the lease it gives must be counted from no earlier.
                    w.last_ack = now;
                }
            }
            Phase::SecondaryArbitrating(_) if ours => {}
            _ => return,
        }
        if unheard {
            self.event(MemberEvent::NotHeard);
        }
        if durable && fit {
            let seq = self.next_seq();
            self.send(now, Kind::Ack, seq, d.seq);
        }
    }

    /// 1, 2: the owner starts a dual generation. Acceptable only for this instance, from the
    /// instance it was synchronised from, in a generation not abstained from, and at exactly the
    /// epoch applied here.
    fn dual_start(&mut self, now: Instant, d: &Datagram) {
        if d.peer_boot != self.boot || d.generation <= self.journal.record.abstained {
            return;
        }
        let (source, seq) = match &self.phase {
            Phase::Syncing(s) => (s.synced, 0),
            Phase::Secondary(w) => (Some(w.owner), w.seq),
            _ => return,
        };
        if source != Some(d.boot) {
            return;
        }
        if d.generation <= self.generation {
            self.confirm_dual(now, d);
            return;
        }
        let fits = d.epoch == self.epoch || broken!(self, AnyEpoch);
        if !fits || self.health == Health::Fatal {
            self.event(MemberEvent::DualStartRefused {
                generation: d.generation,
                epoch: d.epoch,
            });
            return;
        }
        self.generation = d.generation;
        // What was asked before this generation may be answered from before it.
        self.inquiry.take_if(|inquiry| inquiry.ballot().is_none());
        let after = self.persist(Claim::DualPartner);
        self.enter(Phase::Secondary(Watch {
            owner: d.boot,
            last_heartbeat: now,
            last_ack: now,
            seq,
            after,
            heard: (0, now),
            unheard: false,
            fresh: None,
        }));
        // Whether this host could take over is known only when the register was seen to say so.
        if self.has_arbiter() {
            let _mark = self.read_register(now);
        }
    }

    fn confirm_dual(&mut self, now: Instant, d: &Datagram) {
        if let Phase::Secondary(w) = &self.phase
            && d.generation == self.generation
            && self.is_durable(w.after)
        {
            self.say(now, Control::DualAck);
        }
    }

    /// Says what waited for write `id`, and for nothing after it (O5).
    pub(super) fn speak_if_durable(&mut self, now: Instant, id: PersistId) {
        self.say_prepared(now);
        self.yield_if_prepared(now);
        match &self.phase {
            Phase::Secondary(w) if self.is_durable(w.after) && w.after <= id => {
                self.say(now, Control::DualAck);
            }
            Phase::Syncing(Syncing {
                abstaining: Some(after),
                ..
            })
            | Phase::Fenced(Fenced {
                yielding: Some((_, after)),
                ..
            }) if *after == id => self.send_control(now),
            Phase::Dual(p) if p.starting == Some(id) => self.send_control(now),
            _ => {}
        }
    }

    /// 1: the owner's state is whole here.
    pub(super) fn synced(&mut self, from: BootId, epoch: Epoch) {
        if let Phase::Syncing(s) = &mut self.phase {
            s.synced = Some(from);
            self.epoch = epoch;
        }
    }

    /// 2, 6, 7: the owner gave the VM away.
    fn yielded(&mut self, now: Instant, d: &Datagram) {
        match &self.phase {
            Phase::Secondary(_) if d.generation == self.generation => self.bid(now, true, false),
            Phase::SecondaryArbitrating(_) if d.generation == self.generation => self.waive(),
            Phase::TakeoverWait(_) if d.generation.next() == self.generation => self.waive(),
            _ => {}
        }
    }

    /// The owner's lease need not be waited for.
    pub(super) fn waive(&mut self) {
        match &mut self.phase {
            Phase::SecondaryArbitrating(bid) => bid.waived = true,
            Phase::TakeoverWait(wait) => wait.ready_at = Instant::ZERO,
            _ => {}
        }
    }

    fn drop_request(&mut self, now: Instant, d: &Datagram) {
        if d.generation == self.generation {
            self.abstain(now);
        }
    }

    /// 2 → 1: give the claim on the next generation away. Durably, then aloud (O5).
    pub(super) fn abstain(&mut self, now: Instant) {
        if !matches!(self.phase, Phase::Secondary(_)) {
            return;
        }
        if broken!(self, AbstainForgotten) {
            self.say(now, Control::Abstain);
            return;
        }
        self.journal.record.abstained = self.generation;
        let abstaining = Some(self.persist(Claim::Abstained));
        self.push(MemberOutput::DiscardVm);
        self.enter(Phase::Syncing(Syncing {
            synced: None,
            abstaining,
        }));
        self.send_control(now);
    }

    /// The replica here, or the one there, is of no use any more.
    pub(super) fn replica_lost(&mut self, now: Instant) {
        match &mut self.phase {
            Phase::Syncing(s) => s.synced = None,
            Phase::Secondary(_) => self.abstain(now),
            Phase::SecondaryArbitrating(bid) => bid.capable = false,
            Phase::TakeoverWait(_) => {
                self.enter(Phase::Fenced(Fenced {
                    intact: false,
                    was: PriorRole::DualPartner,
                    of: self.generation,
                    yielding: None,
                }));
                self.hand_back(now, PriorRole::DualPartner);
            }
            Phase::Fenced(f) if f.was == PriorRole::DualPartner => f.intact = false,
            _ => self.replication_dead(),
        }
    }

    /// The channels are dead: an owner that hears heartbeats asks the partner to abstain.
    pub(super) fn replication_dead(&mut self) {
        match &mut self.phase {
            Phase::Dual(p) | Phase::PrimaryArbitrating(p) => p.dropping = true,
            Phase::Solo(s) => {
                s.replica = None;
                s.syncing = None;
            }
            _ => {}
        }
    }

    /// 2 → 6: ask to be owner. From here on nothing is acknowledged in this generation (O1).
    pub(super) fn bid(&mut self, now: Instant, waived: bool, vouched: bool) {
        let Phase::Secondary(watch) = &self.phase else {
            return;
        };
        let watch = watch.clone();
        if self.health == Health::Fatal {
            return;
        }
        if matches!(self.config.arbitration, Arbitration::None { .. }) && !waived {
            if !self.may_bid() && !vouched {
                return;
            }
            self.event(MemberEvent::Critical(Critical::UnsafeTakeover));
        }
        self.enter(Phase::SecondaryArbitrating(Candidate {
            watch,
            waived,
            capable: true,
        }));
        let expect = self.generation;
        self.claim(now, PriorRole::DualPartner, expect, Mode::Solo, self.me);
        if self.config.arbitration == (Arbitration::Arbiter { fence_assist: true }) {
            self.push(MemberOutput::Fence {
                delay: core::time::Duration::ZERO,
            });
        }
    }

    /// Whether silence of the owner is a reason to ask for the VM.
    const fn may_bid(&self) -> bool {
        !matches!(
            self.config.arbitration,
            Arbitration::None {
                unsafe_no_arbiter: false,
                ..
            }
        )
    }

    /// O6, broken: a ballot that was not answered did not happen.
    pub(super) fn forget_bid(&mut self, now: Instant) {
        if let Phase::SecondaryArbitrating(bid) = &self.phase {
            let mut watch = bid.watch.clone();
            watch.last_heartbeat = now;
            self.enter(Phase::Secondary(watch));
        }
    }

    /// 6: what the register says.
    pub(super) fn learn_bid(&mut self, now: Instant, register: Register) {
        let Phase::SecondaryArbitrating(bid) = &self.phase else {
            return;
        };
        let (bid, partner) = (bid.clone(), register.partner == self.me);
        let dual = register.mode == Some(Mode::Dual);
        if register.generation < self.generation
            || (register.generation == self.generation && dual && partner)
        {
            return;
        }
        if register.is_solo_of(self.me) {
            self.granted(now, register, &bid);
        } else if dual && partner && register.generation == self.generation.next() {
            self.generation = register.generation;
            let after = self.persist(Claim::DualPartner);
            self.enter(Phase::Secondary(Watch {
                last_heartbeat: now,
                after,
                fresh: None,
                ..bid.watch
            }));
            if !bid.capable {
                self.abstain(now);
            }
        } else {
            self.push(MemberOutput::PauseVm);
            let of = self.generation;
            self.persist(Claim::Stale);
            self.enter(Phase::Fenced(Fenced {
                intact: bid.capable,
                was: PriorRole::DualPartner,
                of,
                yielding: None,
            }));
        }
    }

    /// 6 → 7: granted. The gate stays shut until the last lease we gave is over (O2) and the
    /// checkpoint in hand is whole or gone.
    fn granted(&mut self, now: Instant, register: Register, bid: &Candidate) {
        self.generation = register.generation;
        self.persist(Claim::Granted);
        self.push(MemberOutput::PauseVm);
        if !bid.capable {
            self.enter(Phase::Fenced(Fenced {
                intact: false,
                was: PriorRole::DualPartner,
                of: register.generation,
                yielding: None,
            }));
            self.hand_back(now, PriorRole::DualPartner);
            return;
        }
        let ready_at = if bid.waived || broken!(self, NoWait) {
            now
        } else {
            bid.watch.last_ack + self.config.wait()
        };
        self.wait_for_settled(ready_at);
    }

    /// → 7.
    pub(super) fn wait_for_settled(&mut self, ready_at: Instant) {
        self.enter(Phase::TakeoverWait(Wait {
            ready_at,
            settled: false,
        }));
        self.push(MemberOutput::Settle);
    }

    /// 7: only an override elsewhere can take the grant away.
    pub(super) fn learn_wait(&mut self, register: Register) {
        if register.generation > self.generation && register.owner != self.me {
            self.lose(PriorRole::DualPartner);
        }
    }

    /// 7: the checkpoint in hand is whole or gone.
    pub(super) fn settled(&mut self, now: Instant) {
        if let Phase::TakeoverWait(wait) = &mut self.phase {
            wait.settled = true;
            self.take_over_if_ready(now);
        }
    }

    fn take_over_if_ready(&mut self, now: Instant) {
        if let Phase::TakeoverWait(wait) = &self.phase
            && wait.settled
            && now >= wait.ready_at
        {
            self.become_solo(self.generation, Opening::TakeOver);
        }
    }

    /// A node says that it owns the VM alone.
    fn solo_notice(&mut self, now: Instant, d: &Datagram) {
        if d.state != MemberState::PrimarySolo {
            return;
        }
        let open_ballot = self
            .inquiry
            .as_ref()
            .and_then(|i| i.ballot())
            .is_some_and(|b| b.expect >= d.generation);
        let newer = d.generation > self.generation && !open_ballot;
        let addressed = self.is_addressed(d);
        match &mut self.phase {
            Phase::Idle(_) => self.overruled_idle(d),
            Phase::Syncing(s) => {
                if newer {
                    s.abstaining = None;
                }
                if addressed && s.synced.is_some_and(|from| from != d.boot) {
                    s.synced = None;
                }
            }
            Phase::Secondary(_) | Phase::SecondaryArbitrating(_) if newer => self.discard(d),
            // A VM that served alone is not thrown away without an operator.
            Phase::Fenced(f) if newer && f.was != PriorRole::Solo => self.discard(d),
            Phase::TakeoverWait(_) if newer => {
                let _mark = self.read_register(now);
            }
            Phase::Dual(_) | Phase::PrimaryArbitrating(_) | Phase::Solo(_) => {
                self.overruled_owner(now, d);
            }
            _ => {}
        }
    }

    /// → 1: the state here is old.
    fn discard(&mut self, d: &Datagram) {
        self.generation = d.generation;
        self.persist(Claim::Stale);
        self.push(MemberOutput::DiscardVm);
        self.enter(Phase::Syncing(Syncing::default()));
    }

    pub(super) fn partner_timeout(&mut self, now: Instant) {
        match &self.phase {
            Phase::Secondary(_) if self.health == Health::Fatal || self.is_hanging() => {
                self.abstain(now);
            }
            Phase::Secondary(w) => {
                let silence = self.config.secondary_silence + self.penalty();
                if now.since(w.last_heartbeat) >= silence {
                    self.bid(now, false, false);
                }
            }
            Phase::TakeoverWait(_) => self.take_over_if_ready(now),
            _ => {}
        }
    }

    pub(super) fn partner_deadline(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Secondary(w) => self
                .may_bid()
                .then(|| w.last_heartbeat + self.config.secondary_silence + self.penalty()),
            Phase::TakeoverWait(w) if w.settled => Some(w.ready_at),
            _ => None,
        }
    }
}
