//! The owner's rows: 3 under leases, 5 asking, 4 alone.

use super::{
    Arbitration, Ballot, BootId, Claim, Control, Critical, Datagram, Flags, Health, Member,
    MemberEvent, MemberOutput, MemberState, Mode, NodeId, PriorRole, Register, RequestId,
    WitnessLoss,
    lease::Lease,
    mutation::broken,
    phase::{Fenced, Opening, Pair, Phase, Solo},
};
use crate::{
    id::{Epoch, Generation},
    time::Instant,
};

impl Member {
    /// 3, 5: an acknowledgement. Valid only for this generation and between these two process
    /// instances; an old one proves nothing.
    pub(super) fn acknowledged(&mut self, now: Instant, d: &Datagram) {
        let lease = self.config.lease;
        let right_generation = d.generation == self.generation || broken!(self, AnyGeneration);
        let any_boot = broken!(self, AnyBoot);
        let from_hearing = broken!(self, LeaseFromHearing);
        let to_me = d.peer_boot == self.boot;
        let (Phase::Dual(pair) | Phase::PrimaryArbitrating(pair)) = &mut self.phase else {
            return;
        };
        if !right_generation || !((to_me && d.boot == pair.partner) || any_boot) {
            return;
        }
        let Some(mut until) = pair.lease.acknowledge(d.ack, now, lease) else {
            return;
        };
        if from_hearing {
            until = now + lease;
        }
        pair.last_ack = now;
        pair.flags = d.flags;
        pair.health = d.health;
        pair.starting = None;
        let dropping = pair.dropping;
        self.gate = self.gate.max(until);
        self.ask_for_dual_again(now, dropping);
    }

    /// 5: the partner is back before the arbiter decided. Ask to stay a pair instead; whichever
    /// of the two ballots comes first decides, both expect the same generation.
    fn ask_for_dual_again(&mut self, now: Instant, dropping: bool) {
        let asking_solo = self
            .inquiry
            .as_ref()
            .and_then(|i| i.ballot())
            .is_some_and(|b| b.mode == Mode::Solo);
        let arbitrating = matches!(self.phase, Phase::PrimaryArbitrating(_));
        if arbitrating && asking_solo && !dropping && self.has_arbiter() {
            let expect = self.generation;
            self.claim(now, PriorRole::DualOwner, expect, Mode::Dual, self.me);
        }
    }

    /// 5, fencing failed: if the partner acknowledges again, go on as a pair.
    pub(super) fn stand_down(&mut self, now: Instant) {
        let silence = self.config.primary_silence;
        match &self.phase {
            Phase::PrimaryArbitrating(pair) if now.since(pair.last_ack) < silence => {
                let pair = pair.clone();
                self.persist(Claim::DualOwner);
                self.enter(Phase::Dual(pair));
            }
            _ => {}
        }
    }

    /// 3, 5: the partner gave its claim away, durably. Nobody else can ask for the next
    /// generation, so it is ours without waiting for the arbiter, which is told in the background.
    pub(super) fn partner_abstained(&mut self, now: Instant, d: &Datagram) {
        let paired = matches!(self.phase, Phase::Dual(_) | Phase::PrimaryArbitrating(_));
        if !paired || d.generation != self.generation {
            return;
        }
        let expect = self.generation;
        let asked = self.inquiry.take().filter(|inquiry| {
            inquiry
                .ballot()
                .is_some_and(|ballot| ballot.mode == Mode::Solo)
        });
        self.become_solo(expect.next(), Opening::GoOn);
        if self.has_arbiter() {
            match asked {
                Some(inquiry) => self.inquiry = Some(inquiry),
                None => self.tell_arbiter(now, expect, false),
            }
        }
    }

    /// Puts a solo ownership that was won without the arbiter into its register.
    pub(super) fn tell_arbiter(&mut self, now: Instant, expect: Generation, force: bool) {
        let ballot = Ballot {
            request: RequestId(self.random()),
            caller: self.me,
            expect,
            mode: Mode::Solo,
            owner: self.me,
            partner: NodeId(0),
            force,
        };
        let after = self.last_write();
        self.cast(now, ballot, PriorRole::Solo, after);
    }

    /// 3: the partner accepted the dual-start.
    pub(super) fn dual_acknowledged(&mut self, d: &Datagram) {
        let generation = self.generation;
        if let Phase::Dual(pair) = &mut self.phase
            && d.generation == generation
            && d.boot == pair.partner
        {
            // What it can do is known from here on: a hand-over may be asked for at once.
            pair.flags = d.flags;
            pair.health = d.health;
            pair.starting = None;
        }
    }

    /// 3 → 5: ask for sole ownership. The gate runs out by itself.
    pub(super) fn arbitrate(&mut self, now: Instant) {
        let Phase::Dual(pair) = &self.phase else {
            return;
        };
        let pair = Pair {
            handover: None,
            ..pair.clone()
        };
        self.enter(Phase::PrimaryArbitrating(pair));
        if broken!(self, OpenUnasked) {
            self.gate = Instant::END;
        }
        let expect = self.generation;
        self.claim(now, PriorRole::DualOwner, expect, Mode::Solo, self.me);
    }

    /// 3, 5: what the register says.
    pub(super) fn learn_paired(&mut self, now: Instant, register: Register) {
        let newer = register.generation > self.generation;
        if register.owner != self.me {
            self.lose(PriorRole::DualOwner);
        } else if newer && register.mode == Some(Mode::Solo) {
            self.become_solo(register.generation, Opening::GoOn);
        } else if newer && let Phase::Dual(pair) | Phase::PrimaryArbitrating(pair) = &self.phase {
            let mut pair = pair.clone();
            self.generation = register.generation;
            pair.starting = Some(self.persist(Claim::DualOwner));
            pair.last_ack = now;
            self.enter(Phase::Dual(pair));
        }
    }

    /// Somebody else owns the VM: shut, pause, keep what is in memory.
    pub(super) fn lose(&mut self, was: PriorRole) {
        self.shut();
        self.push(MemberOutput::PauseVm);
        let of = self.generation;
        self.persist(Claim::Stale);
        self.enter(Phase::Fenced(Fenced {
            intact: true,
            was,
            of,
            yielding: None,
        }));
    }

    /// → 4. The gate opens once the record says so durably: a process that finds its ballot
    /// granted and its record not solo knows that it let nothing out.
    pub(super) fn become_solo(&mut self, generation: Generation, how: Opening) {
        self.generation = generation;
        let after = self.persist(Claim::Solo);
        self.enter(Phase::Solo(Solo {
            opening: Some((after, how)),
            ..Solo::default()
        }));
    }

    /// 4: opens, if the record is durable.
    pub(super) fn open_if_durable(&mut self, now: Instant) {
        let Phase::Solo(Solo {
            opening: Some((after, how)),
            ..
        }) = self.phase
        else {
            return;
        };
        if !self.is_durable(after) {
            return;
        }
        if let Phase::Solo(solo) = &mut self.phase {
            solo.opening = None;
        }
        self.gate = Instant::END;
        let generation = self.generation;
        match how {
            Opening::GoOn => {
                // Held output is flushed on this order, so the gate comes first.
                self.tell_gate(now);
                self.push(MemberOutput::DropReplication);
            }
            Opening::TakeOver => {
                self.push(MemberOutput::StartTakeover { generation });
                self.push(MemberOutput::ResumeVm);
            }
            Opening::Resume => self.push(MemberOutput::ResumeVm),
            Opening::ColdBoot => self.push(MemberOutput::ColdBoot { generation }),
        }
        self.tell_gate(now);
        if how != Opening::GoOn {
            self.push(MemberOutput::Announce);
        }
        self.say(now, Control::SoloNotice);
    }

    /// 4: an instance of the peer is idle and can be synchronised.
    pub(super) fn peer_idle(&mut self, d: &Datagram) {
        // Who could not take over is not synchronised: becoming a pair would only mute this host.
        let fit = d.state == MemberState::Syncing && d.health != Health::Fatal;
        if !fit || !self.is_addressed(d) {
            return;
        }
        if let Phase::Solo(solo) = &mut self.phase
            && solo.opening.is_none()
            && solo.syncing != Some(d.boot)
        {
            solo.syncing = Some(d.boot);
            solo.replica = None;
            self.push(MemberOutput::StartSync { peer: d.boot });
        }
    }

    /// 4: a replica is whole. Ask to become a pair.
    pub(super) fn replica_ready(
        &mut self,
        now: Instant,
        boot: BootId,
        epoch: Epoch,
        evidence_clean: bool,
    ) {
        let Phase::Solo(solo) = &mut self.phase else {
            return;
        };
        if solo.opening.is_some() {
            return;
        }
        // The connection may be up, and a small VM whole over there, before the first datagram.
        solo.syncing = Some(boot);
        if evidence_clean {
            solo.replica = Some((boot, epoch));
            self.protect(now);
        } else {
            self.event(MemberEvent::ReplicaNotClean(epoch));
        }
    }

    /// 4: asks for a dual generation, unless the register has yet to hear of the present one.
    fn protect(&mut self, now: Instant) {
        let ready = matches!(
            &self.phase,
            Phase::Solo(Solo {
                opening: None,
                replica: Some(_),
                ..
            })
        );
        let asking = self.inquiry.as_ref().is_some_and(|i| i.ballot().is_some());
        if ready && !asking {
            let expect = self.generation;
            self.claim(now, PriorRole::Solo, expect, Mode::Dual, self.me);
        }
    }

    /// 4: what the register says.
    pub(super) fn learn_solo(&mut self, now: Instant, register: Register) {
        let Phase::Solo(solo) = &self.phase else {
            return;
        };
        if register.generation < self.generation {
            return;
        }
        if register.owner != self.me {
            self.event(MemberEvent::Critical(Critical::OwnershipLost {
                generation: register.generation,
            }));
            self.lose(PriorRole::Solo);
            return;
        }
        if register.mode == Some(Mode::Solo) {
            if register.generation > self.generation || self.journal.record.claim != Claim::Solo {
                self.generation = register.generation;
                self.persist(Claim::Solo);
            }
            self.protect(now);
            return;
        }
        let asked = match self.journal.record.claim {
            Claim::Arbitrating { ballot, .. } => Some(ballot.request),
            _ => None,
        };
        let replica = solo.replica;
        self.generation = register.generation;
        match replica {
            Some((partner, epoch)) if asked == Some(register.request) => {
                self.become_dual(now, partner, epoch);
            }
            // The replica is gone, and no dual-start was ever sent: nobody else can act on this
            // generation. Back to sole ownership.
            _ => self.claim(
                now,
                PriorRole::Solo,
                register.generation,
                Mode::Solo,
                self.me,
            ),
        }
    }

    /// 4 → 3. Under leases from now on, and only then is the partner told that it may take over
    /// (O4).
    fn become_dual(&mut self, now: Instant, partner: BootId, epoch: Epoch) {
        if !broken!(self, UnlimitedWhileDual) {
            self.gate = now + self.config.lease;
        }
        self.epoch = epoch;
        let starting = Some(self.persist(Claim::DualOwner));
        self.enter(Phase::Dual(Pair {
            partner,
            lease: Lease::default(),
            last_ack: now,
            flags: Flags::default(),
            health: Health::Ok,
            starting,
            dropping: false,
            handover: None,
        }));
    }

    /// A node says that it owns the VM alone, in a generation after ours.
    pub(super) fn overruled_owner(&mut self, now: Instant, d: &Datagram) {
        match &self.phase {
            Phase::Dual(_) | Phase::PrimaryArbitrating(_) if d.generation > self.generation => {
                self.lose(PriorRole::DualOwner);
            }
            Phase::Solo(_) if self.has_arbiter() => {
                let asking = self.inquiry.is_some();
                if d.generation > self.generation && !asking {
                    let _mark = self.read_register(now);
                }
            }
            Phase::Solo(_) if d.generation >= self.generation => {
                self.split_brain(now, d.generation);
            }
            _ => {}
        }
    }

    fn split_brain(&mut self, now: Instant, generation: Generation) {
        if now.since(self.witness.alarm) >= self.config.witness_silence {
            self.witness.alarm = now;
            self.event(MemberEvent::Critical(Critical::SplitBrain { generation }));
        }
        if generation > self.generation {
            self.event(MemberEvent::Critical(Critical::OwnershipLost {
                generation,
            }));
            self.lose(PriorRole::Solo);
        }
    }

    pub(super) fn owner_timeout(&mut self, now: Instant) {
        let Phase::Dual(pair) = &self.phase else {
            return;
        };
        let silent = now.since(pair.last_ack) >= self.config.primary_silence + self.penalty();
        let unfit = self.health == Health::Fatal
            || self.is_hanging()
            || (self.health == Health::Degraded && pair.health == Health::Ok);
        if unfit && self.partner_can_take_over(pair) {
            self.give_away(now);
            return;
        }
        self.yield_if_prepared(now);
        let Phase::Dual(_) = &self.phase else {
            return;
        };
        let nominate = self.config.witness_loss == WitnessLoss::NominatePrimary
            && self.has_arbiter()
            && !self.sees_arbiter(now);
        if nominate && let Phase::Dual(pair) = &mut self.phase {
            pair.dropping = true;
        }
        if silent && self.may_ask() {
            self.arbitrate(now);
        }
    }

    /// Whether silence of the partner is a reason to ask for sole ownership.
    const fn may_ask(&self) -> bool {
        !matches!(
            self.config.arbitration,
            Arbitration::None {
                primary_survives: false,
                ..
            }
        )
    }

    pub(super) fn partner_can_take_over(&self, pair: &Pair) -> bool {
        let needed = if self.has_arbiter() {
            Flags::CAPABLE | Flags::RECORD | Flags::ARBITER | Flags::SHARED
        } else {
            Flags::CAPABLE | Flags::RECORD
        };
        pair.flags.has(needed)
    }

    pub(super) fn owner_deadline(&self) -> Option<Instant> {
        let Phase::Dual(pair) = &self.phase else {
            return None;
        };
        self.may_ask()
            .then(|| pair.last_ack + self.config.primary_silence + self.penalty())
            .into_iter()
            .chain(self.handover_deadline())
            .min()
    }
}
