//! The one guest behind a machine: one operation at a time, and a run state that follows what is
//! wanted.
//!
//! Nobody says "resume" in the middle of a transaction. Each role computes whether the guest
//! *should* run now; when no operation is in progress and reality differs, the difference becomes
//! an operation. So no path through an abort, a takeover or an operator's stop can leave a guest
//! stopped by accident, or running by accident (spec checkpoint 10.3, qemu-notes A5, A6).

use alloc::collections::VecDeque;

use crate::{
    error::Misuse,
    machine::{GuestDone, GuestOp, GuestOpKind},
};

/// Operations for the guest, in order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Hands {
    queue: VecDeque<GuestOp>,
    busy: Option<GuestOpKind>,
    /// A capture in progress resumes by itself.
    resumes: bool,
    running: bool,
}

impl Hands {
    pub(crate) const fn new(running: bool) -> Self {
        Self {
            queue: VecDeque::new(),
            busy: None,
            resumes: false,
            running,
        }
    }

    /// Queues an operation.
    pub(crate) fn push(&mut self, op: GuestOp) {
        self.queue.push_back(op);
    }

    /// Drops operations that have not been handed out and have no point without the peer. Hooks
    /// are kept: a disk that was not told of a takeover would go on as a replica, and an operator
    /// waits for the answer.
    pub(crate) fn forget_queued(&mut self) {
        self.queue
            .retain(|op| matches!(op, GuestOp::Replication(_)));
    }

    /// Whether the guest's vCPUs are stopped and nothing is in progress or queued.
    pub(crate) fn idle_and_stopped(&self) -> bool {
        !self.running && self.idle()
    }

    /// Whether nothing is in progress or queued.
    pub(crate) fn idle(&self) -> bool {
        self.busy.is_none() && self.queue.is_empty()
    }

    pub(crate) const fn busy(&self) -> Option<GuestOpKind> {
        self.busy
    }

    /// The next operation, if none is in progress: a queued one, or else whatever brings the guest
    /// to the wanted run state.
    pub(crate) fn poll(&mut self, should_run: bool) -> Option<GuestOp> {
        if self.busy.is_some() {
            return None;
        }
        let op = match self.queue.pop_front() {
            Some(op) => op,
            None if should_run != self.running => {
                if should_run {
                    GuestOp::Resume
                } else {
                    GuestOp::Pause
                }
            }
            None => return None,
        };
        self.resumes = matches!(op, GuestOp::Capture { resume: true, .. });
        self.busy = Some(op.kind());
        Some(op)
    }

    /// Checks that `done` ends the operation in progress, and ends it.
    pub(crate) fn done(&mut self, done: &GuestDone) -> Result<(), Misuse> {
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
        if self.busy != Some(kind) {
            return Err(Misuse::UnexpectedDone {
                got: kind.name(),
                expected: self.busy.map_or("nothing", GuestOpKind::name),
            });
        }
        self.busy = None;
        match done {
            GuestDone::Paused => self.running = false,
            GuestDone::Resumed => self.running = true,
            GuestDone::Captured(_) => self.running = self.resumes,
            // A capture that failed leaves the guest as it was, or running again if it had been
            // told to resume; either way the wanted state is restored by the next poll.
            GuestDone::Failed {
                op: GuestOpKind::Capture,
                ..
            } => self.running = self.resumes,
            _ => {}
        }
        Ok(())
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
    use crate::{id::Epoch, machine::ReplicationOp};

    #[test]
    fn a_guest_is_brought_to_the_wanted_state_after_whatever_was_queued() {
        let mut hands = Hands::new(true);
        hands.push(GuestOp::Harvest);
        assert_eq!(hands.poll(false), Some(GuestOp::Harvest));
        assert_eq!(hands.poll(false), None, "one at a time");
        hands.done(&GuestDone::Harvested).unwrap();
        assert_eq!(hands.poll(false), Some(GuestOp::Pause));
        hands.done(&GuestDone::Paused).unwrap();
        assert_eq!(hands.poll(false), None);
        assert_eq!(hands.poll(true), Some(GuestOp::Resume));
    }

    #[test]
    fn a_takeover_is_told_to_disks_even_if_the_next_peer_is_lost_meanwhile() {
        let stop = GuestOp::Replication(ReplicationOp::Stop { failover: true });
        let mut hands = Hands::new(false);
        hands.push(GuestOp::CheckState(Epoch(3)));
        assert!(hands.poll(true).is_some());
        hands.push(stop.clone());
        hands.push(GuestOp::Harvest);
        hands.forget_queued();
        hands.done(&GuestDone::StateChecked(Epoch(3))).unwrap();
        assert_eq!(hands.poll(true), Some(stop));
        hands
            .done(&GuestDone::Replication(ReplicationOp::Stop {
                failover: true,
            }))
            .unwrap();
        assert_eq!(hands.poll(true), Some(GuestOp::Resume));
    }

    #[test]
    fn an_end_that_was_not_begun_is_misuse() {
        let mut hands = Hands::new(true);
        assert_eq!(
            hands.done(&GuestDone::Paused),
            Err(Misuse::UnexpectedDone {
                got: "pause",
                expected: "nothing"
            })
        );
    }
}
