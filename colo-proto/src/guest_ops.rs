//! The one guest behind a machine: one operation at a time, and a run state that follows what is
//! wanted.
//!
//! Nobody says "resume" in the middle of a transaction. Each role computes whether the guest
//! *should* run now; when no operation is in progress and reality differs, the difference becomes
//! an operation. So no path through an abort, a takeover or an operator's stop can leave a guest
//! stopped by accident, or running by accident (spec checkpoint 8, spec qemu A5, A6).

use alloc::collections::VecDeque;
use core::time::Duration;

use crate::{
    command::CommandId,
    error::Misuse,
    id::Epoch,
    machine::{Deadline, GuestDone, GuestOp, GuestOpKind, TimerKind},
    time::Instant,
};

/// How long a guest that could not be stopped is left alone before it is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Operations for the guest, in order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct GuestOps {
    queue: VecDeque<(GuestOp, Option<CommandId>)>,
    busy: Option<Busy>,
    /// `None`: a capture failed on the way, and the guest may run or not.
    running: Option<bool>,
    /// The guest could not be stopped; not tried again before this.
    retry: Option<Instant>,
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
            running: Some(running),
            retry: None,
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
        self.running == Some(false) && self.idle()
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
    pub(crate) fn poll(&mut self, now: Instant, should_run: bool) -> Option<GuestOp> {
        if self.busy.is_some() {
            return None;
        }
        let (op, by) = match self.queue.pop_front() {
            Some(queued) => queued,
            None if self.running != Some(should_run) => {
                if should_run {
                    self.retry = None;
                    (GuestOp::Resume, None)
                } else if self.retry.is_some_and(|at| now < at) {
                    return None;
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

    /// When a guest that could not be stopped is tried again.
    pub(crate) fn deadline(&self, should_run: bool) -> Option<Deadline> {
        let waits = !should_run && self.running != Some(false) && self.idle();
        let at = self.retry.filter(|_| waits)?;
        Some(Deadline {
            at,
            why: TimerKind::Guest,
        })
    }

    /// Checks that `done` ends the operation in progress, and ends it. Gives back the command that
    /// asked for it.
    pub(crate) fn done(
        &mut self,
        now: Instant,
        done: &GuestDone,
    ) -> Result<Option<CommandId>, Misuse> {
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
            GuestDone::Paused => {
                self.running = Some(false);
                self.retry = None;
            }
            GuestDone::Resumed => self.running = Some(true),
            GuestDone::Captured(_) => self.running = Some(busy.resumes),
            GuestDone::Failed {
                op: GuestOpKind::Pause,
                ..
            } => self.retry = Some(now + RETRY),
            // A guest that was told to resume runs again. One that was to stay stopped may have been
            // stopped already, or not yet: the next poll says which of the two is wanted.
            GuestDone::Failed {
                op: GuestOpKind::Capture,
                ..
            } => {
                self.running = match self.running {
                    _ if busy.resumes => Some(true),
                    Some(false) => Some(false),
                    _ => None,
                }
            }
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

    const NOW: Instant = Instant::ZERO;

    #[test]
    fn a_guest_is_brought_to_the_wanted_state_after_whatever_was_queued() {
        let mut ops = GuestOps::new(true);
        ops.push(GuestOp::Harvest, None);
        assert_eq!(ops.poll(NOW, false), Some(GuestOp::Harvest));
        assert_eq!(ops.poll(NOW, false), None, "one at a time");
        ops.done(NOW, &GuestDone::Harvested).unwrap();
        assert_eq!(ops.poll(NOW, false), Some(GuestOp::Pause));
        ops.done(NOW, &GuestDone::Paused).unwrap();
        assert_eq!(ops.poll(NOW, false), None);
        assert_eq!(ops.poll(NOW, true), Some(GuestOp::Resume));
    }

    #[test]
    fn a_takeover_is_told_to_disks_even_if_the_next_peer_is_lost_meanwhile() {
        let stop = GuestOp::Replication(ReplicationOp::Stop { failover: true });
        let mut ops = GuestOps::new(false);
        ops.push(GuestOp::CheckState(Epoch(3)), None);
        assert!(ops.poll(NOW, true).is_some());
        ops.push(stop.clone(), None);
        ops.push(GuestOp::Harvest, None);
        ops.forget_queued();
        ops.done(NOW, &GuestDone::StateChecked(Epoch(3))).unwrap();
        assert_eq!(ops.poll(NOW, true), Some(stop));
        ops.done(
            NOW,
            &GuestDone::Replication(ReplicationOp::Stop { failover: true }),
        )
        .unwrap();
        assert_eq!(ops.poll(NOW, true), Some(GuestOp::Resume));
    }

    #[test]
    fn an_end_that_was_not_begun_is_misuse() {
        let mut ops = GuestOps::new(true);
        assert_eq!(
            ops.done(NOW, &GuestDone::Paused),
            Err(Misuse::UnexpectedDone {
                got: "pause",
                expected: "nothing"
            })
        );
    }

    fn failed(op: GuestOpKind) -> GuestDone {
        let why = "told to".into();
        GuestDone::Failed { op, why }
    }

    #[test]
    fn a_guest_that_cannot_be_stopped_is_tried_again_after_a_while_and_not_at_once() {
        let mut ops = GuestOps::new(true);
        assert_eq!(ops.poll(NOW, false), Some(GuestOp::Pause));
        ops.done(NOW, &failed(GuestOpKind::Pause)).unwrap();
        assert_eq!(ops.poll(NOW, false), None);
        let again = ops.deadline(false).unwrap().at;
        assert_eq!(again, NOW + RETRY);
        assert_eq!(ops.poll(again, false), Some(GuestOp::Pause));
        ops.done(again, &GuestDone::Paused).unwrap();
        assert_eq!(ops.deadline(false), None);
        assert!(ops.idle_and_stopped());
    }

    #[test]
    fn a_capture_that_fails_before_it_stopped_the_guest_leaves_no_guest_running_unseen() {
        let mut ops = GuestOps::new(true);
        let (epoch, also, resume) = (Epoch(1), crate::id::PageRuns::new(), false);
        ops.push(
            GuestOp::Capture {
                epoch,
                also,
                resume,
            },
            None,
        );
        assert!(ops.poll(NOW, false).is_some());
        ops.done(NOW, &failed(GuestOpKind::Capture)).unwrap();
        assert!(!ops.idle_and_stopped());
        assert_eq!(ops.poll(NOW, false), Some(GuestOp::Pause));
    }
}
