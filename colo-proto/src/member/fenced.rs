//! Row 8: not the owner, the VM paused. Yielding, handing back, coming back.

use super::{
    Claim, Health, Member, MemberOutput, Mode, PriorRole, Register,
    mutation::broken,
    phase::{Fenced, Opening, Phase},
};
use crate::time::Instant;

impl Member {
    /// 3 → 8: give the VM to the partner. The gate shuts first; the yield leaves once it is
    /// durable (O5), and then the partner need not wait for a lease.
    pub(super) fn give_away(&mut self, now: Instant) {
        if !broken!(self, YieldKeepsGate) {
            self.shut();
        }
        self.push(MemberOutput::PauseVm);
        self.yield_vm(now, true);
    }

    /// → 8, yielding.
    pub(super) fn yield_vm(&mut self, now: Instant, intact: bool) {
        if self.is_hanging() {
            // The hang is what we yield for; a later one counts anew.
            self.forgive_hang(now);
        }
        let of = self.generation;
        let after = self.persist(Claim::Yielded);
        self.enter(Phase::Fenced(Fenced {
            intact,
            was: PriorRole::DualOwner,
            of,
            yielding: Some((now, after)),
        }));
        self.send_control(now);
    }

    /// Names the peer as owner of a generation that was granted to us and never used.
    pub(super) fn hand_back(&mut self, now: Instant, from: PriorRole) {
        if self.has_arbiter() {
            let expect = self.generation;
            self.claim(now, from, expect, Mode::Solo, self.config.peer);
        }
    }

    /// 8: what the register says.
    pub(super) fn learn_fenced(&mut self, now: Instant, register: Register) {
        let Phase::Fenced(fenced) = &mut self.phase else {
            return;
        };
        if register.is_solo_of(self.me) && register.generation > fenced.of {
            let (was, intact) = (fenced.was, fenced.intact);
            match (was, intact) {
                (PriorRole::DualOwner, true) => {
                    self.become_solo(register.generation, Opening::Resume);
                }
                (PriorRole::DualOwner, false) => self.boot_from_disk(register.generation),
                (PriorRole::DualPartner, true) => {
                    self.generation = register.generation;
                    self.persist(Claim::Granted);
                    self.wait_for_settled(now);
                }
                (PriorRole::DualPartner, false) => {
                    fenced.of = register.generation;
                    self.generation = register.generation;
                    self.hand_back(now, PriorRole::DualPartner);
                }
                // Lost while it served alone: only an operator sorts this out.
                (PriorRole::Solo, _) => {}
            }
        } else if register.owner == self.config.peer && register.generation >= fenced.of {
            let offered = fenced.yielding.take().is_some();
            let asked = matches!(self.journal.record.claim, Claim::Arbitrating { .. });
            if offered || asked {
                self.persist(Claim::Stale);
            }
            if register.is_solo_of(self.config.peer) && !self.peer_lives(now) {
                self.nobody_serves(register.owner, register.generation);
            }
        }
    }

    /// 8: nobody took what was offered. Ask for it back; the register decides whether the partner
    /// was faster.
    pub(super) fn fenced_timeout(&mut self, now: Instant) {
        let silence = self.config.secondary_silence;
        let well = self.health != Health::Fatal;
        let Phase::Fenced(fenced) = &mut self.phase else {
            return;
        };
        let Some((since, after)) = fenced.yielding else {
            return;
        };
        let (expect, intact) = (fenced.of, fenced.intact);
        if now.since(since) >= silence
            && well
            && self.has_arbiter()
            && self.is_durable(after)
            && self.inquiry.as_ref().is_none_or(|i| i.ballot().is_none())
        {
            if !intact && !self.config.autostart {
                return self.nobody_serves(self.me, expect);
            }
            if let Phase::Fenced(fenced) = &mut self.phase {
                fenced.yielding = None;
            }
            self.claim(now, PriorRole::DualOwner, expect, Mode::Solo, self.me);
        }
    }

    /// Pauses, for the operator's `Join`: the state here is given up.
    pub(super) fn give_up_state(&mut self) {
        self.push(MemberOutput::DiscardVm);
        self.persist(Claim::Stale);
    }
}
