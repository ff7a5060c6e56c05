//! What the guest side does: operations, and the program of the toy guest.

use std::time::Duration;

use colo_proto::{
    id::Slot,
    machine::{Captured, GuestDone, GuestOp, GuestOpKind, Input},
    member::NodeId,
};

use crate::{
    guest::{Guest, PAGES},
    world::{What, World},
};

impl World {
    /// The guest works off what it was given.
    pub(crate) fn answer(&mut self, i: usize) {
        loop {
            let salt = self.next();
            let diverges = self.setup.diverge > salt % 100;
            let Some(p) = &mut self.hosts[i].process else {
                return;
            };
            let epoch = p.guest.epoch;
            let Some((before, after, frame)) = p.guest.step(if diverges { salt } else { 0 }) else {
                return;
            };
            let at = p.last_frame.max(self.t + salt % 300);
            p.last_frame = at;
            let ticks = p.guest.ticks;
            self.parents.insert(after, (before, ticks));
            self.soon(i, at - self.t, What::FromGuest(epoch, frame));
        }
    }

    pub(crate) fn operate(&mut self, i: usize) {
        let Some(p) = &mut self.hosts[i].process else {
            return;
        };
        let Some(op) = p.guest.busy.take() else {
            return;
        };
        let kind = op.kind();
        if self.hosts[i].fail.take_if(|fail| *fail == kind).is_some() {
            let guest = &mut p.guest;
            guest.whole &= !matches!(kind, GuestOpKind::CommitRam | GuestOpKind::LoadState);
            if let GuestOp::Capture { resume, .. } = op {
                guest.running = resume;
            }
            let failed = GuestDone::Failed {
                op: kind,
                why: "told to fail".to_owned(),
            };
            self.feed(i, Input::Guest(failed));
            return;
        }
        let guest = &mut p.guest;
        let mut wrong = None;
        let mut dirty = None;
        let done = match op {
            GuestOp::Pause => {
                guest.running = false;
                GuestDone::Paused
            }
            GuestOp::Resume => {
                if guest.blank && self.register.is_solo_of(NodeId(i as u64 + 1)) {
                    // A sole owner that lost power boots again; what RAM held is gone for all.
                    *guest = Guest::new(false);
                    guest.dirty = (1 << PAGES) - 1;
                    (guest.whole, guest.blank) = (true, false);
                    self.shown = (0, 1);
                    self.counts.cold_boots += 1;
                }
                if !guest.whole {
                    wrong = Some("a guest runs that is a mixture of two epochs");
                }
                guest.running = true;
                GuestDone::Resumed
            }
            GuestOp::Harvest => {
                dirty = Some(std::mem::take(&mut guest.dirty));
                GuestDone::Harvested
            }
            GuestOp::Capture {
                epoch,
                also,
                resume,
            } => {
                guest.capture(&also);
                dirty = Some(std::mem::take(&mut guest.dirty));
                guest.epoch = epoch;
                guest.running = resume;
                GuestDone::Captured(Captured {
                    epoch,
                    state_len: guest.state_out.len() as u64,
                    inputs: guest.consumed,
                    pause: Duration::from_micros(50),
                    live: Duration::ZERO,
                })
            }
            GuestOp::CheckState(epoch) => {
                if guest.state_is_good() {
                    GuestDone::StateChecked(epoch)
                } else {
                    GuestDone::Failed {
                        op: kind,
                        why: "not a state".to_owned(),
                    }
                }
            }
            GuestOp::CommitRam { epoch, runs } => {
                if guest.running {
                    wrong = Some("RAM is committed under a running guest");
                }
                guest.commit(&runs);
                GuestDone::RamCommitted(epoch)
            }
            GuestOp::Replication(op) => GuestDone::Replication(op),
            GuestOp::LoadState { epoch, inputs } => {
                if !guest.load(epoch, inputs) {
                    wrong = Some("RAM after a commit is not what it was at the capture");
                }
                GuestDone::StateLoaded(epoch)
            }
            _ => return,
        };
        if let Some(wrong) = wrong {
            self.violate(format!("host {i}: {wrong}"));
        }
        if let Some(dirty) = dirty {
            self.feed(i, Input::Dirty(Slot(0), &[dirty]));
        }
        self.feed(i, Input::Guest(done));
    }
}
