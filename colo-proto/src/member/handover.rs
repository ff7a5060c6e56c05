//! A planned handover: before the owner gives anything up, both hosts write afresh to everything
//! that the takeover will need. What cannot be written is found while the owner still serves.

use super::{
    Control, Datagram, Health, Member, MemberEvent, PersistId, RequestId, Unprotected, Unready,
    phase::Phase,
};
use crate::time::Instant;

/// The owner prepares to yield.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Handover {
    since: Instant,
    fresh: Fresh,
    /// The partner has written everything afresh.
    there: bool,
}

/// What was written afresh, for a question of this name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Fresh {
    name: u64,
    record: PersistId,
    /// The read that the arbiter has to answer.
    arbiter: Option<RequestId>,
}

impl Handover {
    pub(super) const fn name(&self) -> u64 {
        self.fresh.name
    }
}

impl Member {
    /// 3: an operator wants the partner to have the VM.
    pub(super) fn prepare_yield(&mut self, now: Instant) {
        let name = self.random();
        let fresh = self.write_afresh(now, name);
        if let Phase::Dual(pair) = &mut self.phase {
            pair.handover = Some(Handover {
                since: now,
                fresh,
                there: false,
            });
        }
        self.say_prepare(now);
    }

    fn write_afresh(&mut self, now: Instant, name: u64) -> Fresh {
        let record = self.persist_again();
        let arbiter = self.has_arbiter().then(|| self.read_register(now));
        Fresh {
            name,
            record,
            arbiter,
        }
    }

    fn is_written(&self, fresh: &Fresh) -> bool {
        self.is_durable(fresh.record) && fresh.arbiter.is_none()
    }

    /// A read was answered as it should be.
    pub(super) fn note_read(&mut self, request: RequestId) {
        let fresh = match &mut self.phase {
            Phase::Dual(pair) => pair.handover.as_mut().map(|h| &mut h.fresh),
            Phase::Secondary(watch) => watch.fresh.as_mut(),
            _ => None,
        };
        if let Some(fresh) = fresh {
            fresh.arbiter = fresh.arbiter.filter(|asked| *asked != request);
        }
    }

    /// 3: repeated every interval until the partner has answered.
    pub(super) fn say_prepare(&mut self, now: Instant) {
        if let Phase::Dual(pair) = &self.phase
            && let Some(handover) = pair.handover.as_ref().filter(|h| !h.there)
        {
            let name = handover.name();
            self.say_about(now, Control::Prepare, name);
        }
    }

    /// 2: the owner wants to yield.
    pub(super) fn prepare(&mut self, now: Instant, d: &Datagram) {
        let ours = d.generation == self.generation && d.peer_boot == self.boot;
        let Phase::Secondary(watch) = &self.phase else {
            return;
        };
        if !ours || d.boot != watch.owner || self.health == Health::Fatal {
            return;
        }
        if watch.fresh.as_ref().is_none_or(|fresh| fresh.name != d.ack) {
            let fresh = self.write_afresh(now, d.ack);
            if let Phase::Secondary(watch) = &mut self.phase {
                watch.fresh = Some(fresh);
            }
        }
        self.say_prepared(now);
    }

    /// 2: tells the owner, if everything is written.
    pub(super) fn say_prepared(&mut self, now: Instant) {
        if let Phase::Secondary(watch) = &self.phase
            && let Some(fresh) = &watch.fresh
            && self.is_written(fresh)
        {
            let name = fresh.name;
            self.say_about(now, Control::Prepared, name);
        }
    }

    /// 3: the partner has written everything.
    pub(super) fn prepared(&mut self, now: Instant, d: &Datagram) {
        let generation = self.generation;
        if let Phase::Dual(pair) = &mut self.phase
            && d.generation == generation
            && d.boot == pair.partner
            && let Some(handover) = &mut pair.handover
            && handover.name() == d.ack
        {
            handover.there = true;
            // What it can do was seen by writing, later than any acknowledgement.
            pair.flags = d.flags;
        }
        self.yield_if_prepared(now);
    }

    /// 3: gives the VM away when both have written everything; says why not when time is up.
    pub(super) fn yield_if_prepared(&mut self, now: Instant) {
        let Phase::Dual(pair) = &self.phase else {
            return;
        };
        let Some(handover) = &pair.handover else {
            return;
        };
        let here = self.is_written(&handover.fresh);
        if here && handover.there {
            return self.give_away(now);
        }
        if now < handover.since + self.handover_limit() {
            return;
        }
        let why = if !self.is_durable(handover.fresh.record) {
            Unprotected::Here(Unready::Record)
        } else if !here {
            Unprotected::Here(Unready::Arbiter)
        } else {
            let there = self.peer_unready(now).unwrap_or(Unready::Silent);
            Unprotected::There(there)
        };
        if let Phase::Dual(pair) = &mut self.phase {
            pair.handover = None;
        }
        self.event(MemberEvent::NotHandedOver(why));
    }

    /// Long enough for each probe to be seen to fail by its flags, so that the reason is known.
    fn handover_limit(&self) -> core::time::Duration {
        self.probe_period() * 2
    }

    pub(super) fn handover_deadline(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Dual(pair) => Some(pair.handover.as_ref()?.since + self.handover_limit()),
            _ => None,
        }
    }
}
