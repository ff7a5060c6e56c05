//! What the guest side does: operations, and the program of the toy guest.

use std::time::Duration;

use colo_proto::{
    id::Slot,
    machine::{Captured, GuestDone, GuestOp, GuestOpKind, Input, ReplicationOp},
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
            self.forward_writes(i);
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
        if op == GuestOp::Resume && p.guest.blank && self.register.is_solo_of(NodeId(i as u64 + 1))
        {
            // A sole owner that lost power boots again, and may fail to run then; what RAM held is
            // gone for all.
            p.guest = Guest {
                disk: p.guest.disk.clone(),
                dirty: (1 << PAGES) - 1,
                whole: true,
                blank: false,
                ..Guest::new(false)
            };
            self.shown = (0, 1);
            self.counts.cold_boots += 1;
        }
        if let GuestOp::CheckState(_) = op {
            let needs = p.guest.needs();
            let here = !p.guest.state_is_good() || p.guest.disk.has(needs);
            if p.guest.patience == 0 {
                p.guest.patience = self.t + 500_000;
            }
            if !here && needs.0 != 0 && self.t < p.guest.patience {
                // What the disk needs may still be on its way.
                p.guest.busy = Some(op);
                self.soon(i, 100, What::Op);
                return;
            }
            p.guest.patience = 0;
        }
        if self.hosts[i].fail.take_if(|fail| *fail == kind).is_some() {
            let guest = &mut p.guest;
            guest.whole &= !matches!(kind, GuestOpKind::CommitRam | GuestOpKind::LoadState);
            match op {
                GuestOp::Capture { resume, .. } => guest.running = resume,
                // An end is an end, even if something was wrong with it.
                GuestOp::Replication(end @ ReplicationOp::Stop { .. }) => {
                    self.hook(i, end);
                }
                _ => {}
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
                let good = guest.state_is_good();
                if good && guest.needs().0 != 0 && guest.disk.has(guest.needs()) {
                    guest.checked = Some(epoch);
                    GuestDone::StateChecked(epoch)
                } else {
                    GuestDone::Failed {
                        op: kind,
                        why: if good {
                            "the disk is behind"
                        } else {
                            "not a state"
                        }
                        .to_owned(),
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
            GuestOp::Replication(op) => {
                if self.hook(i, op) {
                    GuestDone::Replication(op)
                } else {
                    GuestDone::Failed {
                        op: kind,
                        why: "it was stopped".to_owned(),
                    }
                }
            }
            GuestOp::LoadState { epoch, inputs } => {
                wrong = guest.load(epoch, inputs);
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
