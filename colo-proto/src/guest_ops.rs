//! The one guest behind a machine: one operation at a time, and a run state that follows what is
//! wanted.
//!
//! Nobody says "resume" in the middle of a transaction. Each role computes whether the guest
//! *should* run now; when no operation is in progress and reality differs, the difference becomes
//! an operation. So no path through an abort, a takeover or an operator's stop can leave a guest
//! stopped by accident, or running by accident (spec checkpoint 8, spec qemu A5, A6).

use alloc::collections::VecDeque;

use crate::{
    command::CommandId,
    error::Misuse,
    id::Epoch,
    machine::{GuestDone, GuestOp, GuestOpKind},
};

/// Operations for the guest, in order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct GuestOps {
    queue: VecDeque<(GuestOp, Option<CommandId>)>,
    busy: Option<Busy>,
    running: bool,
}

/// What is in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Busy {
    kind: GuestOpKind,
    /// The epoch of a capture.
    captures: Option<Epoch>,
    /// A capture that resumes by itself.
    resumes: bool,
    /// Who asked for it, if it was an operator.
    by: Option<CommandId>,
}

impl GuestOps {
    pub(crate) const fn new(running: bool) -> Self {
        Self {
            queue: VecDeque::new(),
            busy: None,
            running,
        }
    }

    /// Queues an operation, which an operator may have asked for.
    pub(crate) fn push(&mut self, op: GuestOp, by: Option<CommandId>) {
        self.queue.push_back((op, by));
    }

    /// Drops operations that have not been handed out and have no point without the peer. Hooks
    /// are kept: a disk that was not told of a takeover would go on as a replica, and an operator
    /// waits for the answer.
    pub(crate) fn forget_queued(&mut self) {
        self.queue
            .retain(|(op, _)| matches!(op, GuestOp::Replication(_)));
    }

    /// Whether the guest's vCPUs are stopped and nothing is in progress or queued.
    pub(crate) fn idle_and_stopped(&self) -> bool {
        !self.running && self.idle()
    }

    /// Whether nothing is in progress or queued.
    pub(crate) fn idle(&self) -> bool {
        self.busy.is_none() && self.queue.is_empty()
    }

    pub(crate) fn busy(&self) -> Option<GuestOpKind> {
        self.busy.map(|busy| busy.kind)
    }

    /// The epoch of the capture in progress, which the guest may already have run after.
    pub(crate) fn captures(&self) -> Option<Epoch> {
        self.busy?.captures
    }

    /// Operations that operators wait for.
    pub(crate) fn asked_for(&self) -> usize {
        let queued = self.queue.iter().filter(|(_, by)| by.is_some()).count();
        queued + usize::from(self.busy.is_some_and(|busy| busy.by.is_some()))
    }

    /// The next operation, if none is in progress: a queued one, or else whatever brings the guest
    /// to the wanted run state.
    pub(crate) fn poll(&mut self, should_run: bool) -> Option<GuestOp> {
        if self.busy.is_some() {
            return None;
        }
        let (op, by) = match self.queue.pop_front() {
            Some(queued) => queued,
            None if should_run != self.running => {
                if should_run {
                    (GuestOp::Resume, None)
                } else {
                    (GuestOp::Pause, None)
                }
            }
            None => return None,
        };
        let captures = match op {
            GuestOp::Capture { epoch, .. } => Some(epoch),
            _ => None,
        };
        self.busy = Some(Busy {
            kind: op.kind(),
            captures,
            resumes: matches!(op, GuestOp::Capture { resume: true, .. }),
            by,
        });
        Some(op)
    }

    /// Checks that `done` ends the operation in progress, and ends it. Gives back the command that
    /// asked for it.
    pub(crate) fn done(&mut self, done: &GuestDone) -> Result<Option<CommandId>, Misuse> {
        let kind = match done {
            GuestDone::Paused => GuestOpKind::Pause,
            GuestDone::Resumed => GuestOpKind::Resume,
            GuestDone::Harvested => GuestOpKind::Harvest,
            GuestDone::Captured(_) => GuestOpKind::Capture,
            GuestDone::StateChecked(_) => GuestOpKind::CheckState,
            GuestDone::RamCommitted(_) => GuestOpKind::CommitRam,
            GuestDone::Replication(_) => GuestOpKind::Replication,
            GuestDone::StateLoaded(_) => GuestOpKind::LoadState,
            GuestDone::Failed { op, .. } => *op,
        };
        let Some(busy) = self.busy.take_if(|busy| busy.kind == kind) else {
            return Err(Misuse::UnexpectedDone {
                got: kind.name(),
                expected: self.busy().map_or("nothing", GuestOpKind::name),
            });
        };
        match done {
            GuestDone::Paused => self.running = false,
            GuestDone::Resumed => self.running = true,
            GuestDone::Captured(_) => self.running = busy.resumes,
            // A capture that failed leaves the guest as it was, or running again if it had been
            // told to resume; either way the wanted state is restored by the next poll.
            GuestDone::Failed {
                op: GuestOpKind::Capture,
                ..
            } => self.running = busy.resumes,
            _ => {}
        }
        Ok(busy.by)
    }
}

impl GuestOpKind {
    /// Its name in errors and logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Harvest => "harvest",
            Self::Capture => "capture",
            Self::CheckState => "check state",
            Self::CommitRam => "commit ram",
            Self::Replication => "replication",
            Self::LoadState => "load state",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::ReplicationOp;

    #[test]
    fn a_guest_is_brought_to_the_wanted_state_after_whatever_was_queued() {
        let mut ops = GuestOps::new(true);
        ops.push(GuestOp::Harvest, None);
        assert_eq!(ops.poll(false), Some(GuestOp::Harvest));
        assert_eq!(ops.poll(false), None, "one at a time");
        ops.done(&GuestDone::Harvested).unwrap();
        assert_eq!(ops.poll(false), Some(GuestOp::Pause));
        ops.done(&GuestDone::Paused).unwrap();
        assert_eq!(ops.poll(false), None);
        assert_eq!(ops.poll(true), Some(GuestOp::Resume));
    }

    #[test]
    fn a_takeover_is_told_to_disks_even_if_the_next_peer_is_lost_meanwhile() {
        let stop = GuestOp::Replication(ReplicationOp::Stop { failover: true });
        let mut ops = GuestOps::new(false);
        ops.push(GuestOp::CheckState(Epoch(3)), None);
        assert!(ops.poll(true).is_some());
        ops.push(stop.clone(), None);
        ops.push(GuestOp::Harvest, None);
        ops.forget_queued();
        ops.done(&GuestDone::StateChecked(Epoch(3))).unwrap();
        assert_eq!(ops.poll(true), Some(stop));
        ops.done(&GuestDone::Replication(ReplicationOp::Stop {
            failover: true,
        }))
        .unwrap();
        assert_eq!(ops.poll(true), Some(GuestOp::Resume));
    }

    #[test]
    fn an_end_that_was_not_begun_is_misuse() {
        let mut ops = GuestOps::new(true);
        assert_eq!(
            ops.done(&GuestDone::Paused),
            Err(Misuse::UnexpectedDone {
                got: "pause",
                expected: "nothing"
            })
        );
    }
}
