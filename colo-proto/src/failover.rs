//! QEMU's failover status and exit reports (spec qemu 16), as facts about what
//! our own machinery does.
//!
//! Differences to QEMU, all from spec qemu 17: a relaunch is never lost (B8), `COLO_EXIT` comes
//! when the guest is safe and says `request` for every requested takeover (D3), and `reason` is one
//! model for both sides (D4).

use crate::status::{ColoExit, ColoMode, ExitReason, FailoverStatus};

/// Failover status, COLO mode and last mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub(crate) struct Failover {
    pub(crate) status: FailoverStatus,
    pub(crate) mode: ColoMode,
    pub(crate) last_mode: ColoMode,
    requested: bool,
    last_reason: ExitReason,
}

impl Failover {
    /// COLO is entered in this role.
    pub(crate) fn enter(&mut self, mode: ColoMode) {
        self.mode = mode;
        self.status = FailoverStatus::None;
        self.requested = false;
    }

    /// `x-colo-lost-heartbeat`. False if a failover is activated already.
    pub(crate) fn request(&mut self) -> bool {
        if self.status != FailoverStatus::None {
            return false;
        }
        self.status = FailoverStatus::Require;
        self.requested = true;
        true
    }

    /// Walks to `to`, giving each state passed on the way to `passed`.
    pub(crate) fn advance(&mut self, to: FailoverStatus, mut passed: impl FnMut(FailoverStatus)) {
        use FailoverStatus::{Active, Completed, None, Relaunch, Require};
        while self.status != to {
            self.status = match (self.status, to) {
                (None, _) => Require,
                (Require, _) => Active,
                (Active, Relaunch) => Relaunch,
                (Active, _) => Completed,
                (Relaunch, _) => None,
                (Completed, _) => return,
            };
            passed(self.status);
        }
    }

    /// A failover that was begun will not happen: the other host owns the VM, or the peer is back.
    pub(crate) fn withdraw(&mut self) {
        if self.status != FailoverStatus::Completed {
            self.status = FailoverStatus::None;
            self.requested = false;
        }
    }

    /// COLO is left. `None` if it was not entered.
    pub(crate) fn leave(&mut self) -> Option<ColoExit> {
        if self.mode == ColoMode::None {
            return None;
        }
        let reason = if self.requested {
            ExitReason::Request
        } else {
            ExitReason::Error
        };
        self.last_mode = self.mode;
        self.last_reason = reason;
        self.mode = ColoMode::None;
        Some(ColoExit {
            mode: self.last_mode,
            reason,
        })
    }

    /// `query-colo-status` `reason`.
    pub(crate) const fn reason(&self) -> ExitReason {
        match self.status {
            FailoverStatus::Require | FailoverStatus::Active | FailoverStatus::Relaunch => {
                ExitReason::Processing
            }
            FailoverStatus::None | FailoverStatus::Completed => self.last_reason,
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::*;

    fn walk(f: &mut Failover, to: FailoverStatus) -> Vec<FailoverStatus> {
        let mut seen = Vec::new();
        f.advance(to, |s| seen.push(s));
        seen
    }

    #[test]
    fn a_takeover_that_meets_a_load_is_relaunched() {
        use FailoverStatus::*;
        let mut f = Failover::default();
        f.enter(ColoMode::Secondary);
        assert!(f.request());
        assert!(!f.request(), "already activated");
        assert_eq!(walk(&mut f, Relaunch), [Active, Relaunch]);
        assert_eq!(f.reason(), ExitReason::Processing);
        // Spec failover section 1: require, active, relaunch, none, require, active, completed.
        assert_eq!(walk(&mut f, Completed), [None, Require, Active, Completed]);
        let exit = f.leave().unwrap();
        assert_eq!(
            (exit.mode, exit.reason),
            (ColoMode::Secondary, ExitReason::Request)
        );
        assert_eq!(f.leave(), Option::None);
    }

    #[test]
    fn an_unrequested_exit_is_an_error_and_entering_again_starts_anew() {
        let mut f = Failover::default();
        f.enter(ColoMode::Primary);
        f.advance(FailoverStatus::Completed, |_| {});
        assert_eq!(f.leave().unwrap().reason, ExitReason::Error);
        assert_eq!(f.last_mode, ColoMode::Primary);
        f.enter(ColoMode::Primary);
        assert_eq!(f.status, FailoverStatus::None);
    }
}
