//! Row 0 and spec ownership 11: what a new process may conclude from its record; and the
//! operator's commands, which are the other way in.

use super::{
    Arbitration, Claim, Command, Critical, Datagram, Flags, Health, Member, MemberEvent,
    MemberOutput, MemberState, Mode, NodeId, PriorRole, Register,
    phase::{Fenced, Idle, Opening, Phase, Syncing},
};
use crate::{id::Generation, time::Instant};

impl Member {
    /// The memory of the last process is gone; its promises are not.
    pub(super) fn resume_from_record(&mut self, now: Instant) {
        let arbiter = self.has_arbiter();
        match self.journal.record.claim {
            Claim::None => {}
            // With an arbiter, `learn_idle` resolves these; the intention comes before anything
            // else (O7).
            Claim::Arbitrating { ballot, from } if arbiter => {
                let after = self.last_write();
                self.cast(now, ballot, from, after);
            }
            Claim::Solo | Claim::Granted if arbiter => {}
            Claim::Solo
            | Claim::Arbitrating {
                from: PriorRole::Solo,
                ..
            } if !self.config.autostart => self.nobody_serves(self.me, self.generation),
            Claim::Solo
            | Claim::Arbitrating {
                from: PriorRole::Solo,
                ..
            } => {
                let expect = self.generation;
                self.claim(now, PriorRole::Solo, expect, Mode::Solo, self.me);
            }
            Claim::DualOwner
            | Claim::Yielded
            | Claim::Arbitrating {
                from: PriorRole::DualOwner,
                ..
            } => self.yield_vm(now, false),
            Claim::DualPartner
            | Claim::Arbitrating {
                from: PriorRole::DualPartner,
                ..
            } => self.abstain_anew(),
            Claim::Granted | Claim::Stale | Claim::Syncing => {
                self.enter(Phase::Syncing(Syncing::default()));
            }
            Claim::Abstained => self.enter(Phase::Syncing(Syncing {
                synced: None,
                abstaining: Some(self.last_write()),
            })),
        }
    }

    /// The replica was in memory: abstain from the generation it was for.
    fn abstain_anew(&mut self) {
        self.journal.record.abstained = self.generation;
        let abstaining = Some(self.persist(Claim::Abstained));
        self.enter(Phase::Syncing(Syncing {
            synced: None,
            abstaining,
        }));
    }

    /// 0: what the register says.
    pub(super) fn learn_idle(&mut self, now: Instant, register: Register) {
        let generation = register.generation;
        if generation == Generation(0) {
            self.event(MemberEvent::WaitingForOperator);
            return;
        }
        let claim = self.journal.record.claim;
        let ours = |request| request == register.request;
        if register.owner != self.me {
            self.generation = generation;
            let partner = register.mode == Some(Mode::Dual) && register.partner == self.me;
            match claim {
                Claim::Arbitrating {
                    from: PriorRole::DualPartner,
                    ..
                } if partner => self.abstain_anew(),
                // Handed back. Should the peer have no use for it either, it comes to us again
                // and we boot from the disk.
                Claim::Arbitrating {
                    from: PriorRole::DualOwner,
                    ballot,
                } if ours(ballot.request) => {
                    self.persist(Claim::Yielded);
                    self.enter(Phase::Fenced(Fenced {
                        intact: false,
                        was: PriorRole::DualOwner,
                        of: generation,
                        yielding: None,
                    }));
                }
                _ => {
                    self.persist(Claim::Stale);
                    self.enter(Phase::Syncing(Syncing::default()));
                }
            }
            return;
        }
        let solo = register.mode == Some(Mode::Solo);
        self.generation = generation;
        match claim {
            Claim::Arbitrating {
                from: PriorRole::Solo,
                ballot,
            } if solo && ours(ballot.request) => self.boot_from_disk(generation),
            Claim::Arbitrating {
                from: PriorRole::DualPartner,
                ..
            }
            | Claim::Granted
                if solo =>
            {
                self.hand_back(now, PriorRole::DualPartner);
            }
            Claim::Arbitrating {
                from: PriorRole::DualOwner,
                ..
            } if solo => {
                let until = now + self.config.secondary_silence * 2;
                if let Phase::Idle(idle) = &mut self.phase {
                    idle.hand_back_until.get_or_insert(until);
                }
            }
            _ if solo => self.ask_to_boot(now),
            // No dual-start was sent for this generation, or we served alone after it.
            Claim::Solo
            | Claim::Arbitrating {
                from: PriorRole::Solo,
                ..
            } => self.ask_to_boot(now),
            _ => self.yield_vm(now, false),
        }
    }

    /// Asks for a generation to boot from the disk in.
    fn ask_to_boot(&mut self, now: Instant) {
        if !self.config.autostart {
            return self.nobody_serves(self.me, self.generation);
        }
        let expect = self.generation;
        self.claim(now, PriorRole::Solo, expect, Mode::Solo, self.me);
    }

    /// 0, granted and never used: hand it to a peer that still has the VM of that generation, or
    /// boot from the disk, which has everything that was let out.
    pub(super) fn idle_timeout(&mut self, now: Instant) {
        let Phase::Idle(Idle {
            hand_back_until: Some(until),
        }) = self.phase
        else {
            return;
        };
        let has_vm = self.peer.flags.has(Flags::CAPABLE)
            && self.peer.generation.next() == self.generation
            && matches!(
                self.peer.state,
                Some(
                    MemberState::Fenced
                        | MemberState::Secondary
                        | MemberState::SecondaryArbitrating
                )
            );
        if has_vm {
            self.phase = Phase::Idle(Idle::default());
            self.hand_back(now, PriorRole::DualOwner);
        } else if now >= until {
            self.boot_from_disk(self.generation);
        }
    }

    /// Boots the VM from the disk, if this node may by itself.
    pub(super) fn boot_from_disk(&mut self, generation: Generation) {
        if self.config.autostart {
            self.become_solo(generation, Opening::ColdBoot);
        } else {
            self.nobody_serves(self.me, generation);
        }
    }

    /// Says once which node must be told to go on.
    pub(super) fn nobody_serves(&mut self, last: NodeId, generation: Generation) {
        if self.nobody != Some((last, generation)) {
            self.nobody = Some((last, generation));
            self.event(MemberEvent::NobodyServes { last, generation });
        }
    }

    /// Whether the peer was heard lately and has a VM, running or not.
    pub(super) fn peer_lives(&self, now: Instant) -> bool {
        let heard = self.peer.state.is_some() && now.since(self.peer.heard) < self.patience();
        let has_vm = match self.peer.state {
            None | Some(MemberState::Idle | MemberState::Syncing) => false,
            Some(MemberState::Fenced) => self.peer.flags.has(Flags::CAPABLE),
            Some(_) => true,
        };
        heard && has_vm
    }

    /// How long a peer that has the VM is given to show itself, or to take what is its own.
    fn patience(&self) -> core::time::Duration {
        self.config.secondary_silence * 2
    }

    /// 1: there is nothing here to serve with, and it may be that nobody else serves either.
    pub(super) fn learn_syncing(&mut self, now: Instant, register: Register) {
        let fenced = self.peer.state == Some(MemberState::Fenced);
        if register.is_solo_of(self.me) && fenced {
            // What was abstained from is long decided, and must not be said of this generation. A
            // fenced peer may still have the VM, or the disk.
            self.phase = Phase::Syncing(Syncing::default());
            self.generation = register.generation;
            self.hand_back(now, PriorRole::DualPartner);
            return;
        }
        if register.generation == Generation(0) {
            if self.create {
                self.begin_boot(now, Generation(0));
            } else if self.nobody.is_none() {
                self.nobody = Some((NodeId(0), Generation(0)));
                self.event(MemberEvent::WaitingForOperator);
            }
            return;
        }
        let ready = self.started + self.patience();
        if now < ready {
            self.witness.next = self.witness.next.min(ready);
            return;
        }
        if self.peer_lives(now) {
            return;
        }
        // A partner that abstained did not serve last, whatever it was granted and never used.
        let served = self.journal.record.claim != Claim::Abstained;
        if register.owner == self.me && (self.create || served && self.config.autostart) {
            self.begin_boot(now, register.generation);
        } else {
            self.nobody_serves(register.owner, register.generation);
        }
    }

    /// 1 → 0: asks for a generation to boot from the disk in.
    fn begin_boot(&mut self, now: Instant, expect: Generation) {
        self.push(MemberOutput::DiscardVm);
        self.enter(Phase::Idle(Idle::default()));
        self.generation = expect;
        self.claim(now, PriorRole::Solo, expect, Mode::Solo, self.me);
    }

    /// 0: a node says that it owns the VM alone. If that is news, there is nothing to resolve.
    pub(super) fn overruled_idle(&mut self, d: &Datagram) {
        let known = match self.journal.record.claim {
            Claim::Arbitrating { ballot, .. } => ballot.expect,
            _ => self.journal.record.generation,
        };
        if d.generation > known.max(self.generation) {
            self.generation = d.generation;
            self.persist(Claim::Stale);
            self.enter(Phase::Syncing(Syncing::default()));
        }
    }

    /// Carries out an operator command, or says that it does not fit.
    pub(super) fn operator(&mut self, now: Instant, command: Command) {
        let state = self.state();
        let asking = self.inquiry.as_ref().is_some_and(|i| i.ballot().is_some());
        match (command, &self.phase) {
            (Command::Create, Phase::Idle(_)) if self.journal.record.claim == Claim::None => {
                self.claim(now, PriorRole::Solo, Generation(0), Mode::Solo, self.me);
            }
            (Command::Join, Phase::Idle(_))
                if self.journal.record.claim == Claim::None && !asking =>
            {
                self.persist(Claim::Syncing);
                self.enter(Phase::Syncing(Syncing::default()));
            }
            // What the record says comes first.
            (Command::Join | Command::Create, Phase::Idle(_)) => {}
            // What it offers, nobody may want; then it asks for it back, and boots.
            (Command::Create, Phase::Fenced(_)) => {}
            (Command::Create, Phase::Syncing(_)) => {
                self.create = true;
                self.witness.next = now;
            }
            (Command::Join, Phase::Fenced(_)) if !asking => {
                self.give_up_state();
                self.enter(Phase::Syncing(Syncing::default()));
            }
            // A partner that is heard all the same shall not become one again.
            (Command::FailOver, Phase::Dual(_)) => {
                self.replication_dead();
                self.arbitrate(now);
            }
            (Command::FailOver, Phase::PrimaryArbitrating(_) | Phase::Solo(_)) => {
                self.replication_dead();
            }
            (Command::FailOver, Phase::Secondary(_)) if self.health != Health::Fatal => {
                self.bid(now, false, true);
            }
            // That is what it does.
            (Command::FailOver, Phase::SecondaryArbitrating(_) | Phase::TakeoverWait(_)) => {}
            (Command::Yield, Phase::Dual(pair)) => {
                if pair.handover.is_none() {
                    self.prepare_yield(now);
                }
            }
            (Command::Detach, Phase::Secondary(_)) => self.abstain(now),
            (Command::Detach, Phase::Dual(_) | Phase::PrimaryArbitrating(_) | Phase::Solo(_)) => {
                self.replication_dead();
            }
            (Command::Override, phase) => match phase {
                Phase::PrimaryArbitrating(_) => self.override_with(now, Some(Opening::GoOn)),
                Phase::Idle(_) => self.override_with(now, Some(Opening::ColdBoot)),
                Phase::Syncing(_) if !self.peer_lives(now) => {
                    self.override_with(now, Some(Opening::ColdBoot));
                }
                Phase::Fenced(f) => {
                    let how = match (f.intact, f.was) {
                        (true, PriorRole::DualPartner) => Opening::TakeOver,
                        (true, _) => Opening::Resume,
                        (false, _) => Opening::ColdBoot,
                    };
                    self.override_with(now, Some(how));
                }
                Phase::SecondaryArbitrating(_) => self.override_with(now, None),
                _ => self.event(MemberEvent::Refused { command, state }),
            },
            _ => self.event(MemberEvent::Refused { command, state }),
        }
    }

    /// Owner by the operator's word. The register is told in the background; if it disagrees, we
    /// stop.
    fn override_with(&mut self, now: Instant, how: Option<Opening>) {
        self.event(MemberEvent::Critical(Critical::OverrideUsed));
        let expect = match self.config.arbitration {
            Arbitration::Arbiter { .. } => {
                self.journal
                    .record
                    .seen
                    .max(match self.journal.record.claim {
                        Claim::Arbitrating { ballot, .. } => ballot.expect,
                        _ => Generation(0),
                    })
            }
            Arbitration::Fence | Arbitration::None { .. } => self.generation,
        };
        let asked = self.inquiry.take().filter(|i| {
            i.ballot()
                .is_some_and(|b| b.owner == self.me && b.mode == Mode::Solo)
        });
        let generation = expect.max(self.generation).next();
        match how {
            Some(how) => self.become_solo(generation, how),
            None => self.learn_bid(now, self.word_of_operator(generation)),
        }
        if self.has_arbiter() {
            match asked {
                Some(inquiry) => self.inquiry = Some(inquiry),
                None => self.tell_arbiter(now, expect, true),
            }
        }
    }

    fn word_of_operator(&self, generation: Generation) -> Register {
        Register {
            generation,
            mode: Some(Mode::Solo),
            owner: self.me,
            ..Register::default()
        }
    }
}
