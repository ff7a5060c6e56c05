//! What `query-colo-status` and its kin print, in QEMU's terms (spec qemu 16) and ours.

use core::time::Duration;

use crate::{
    id::{Epoch, Generation, Role},
    member::{MemberState, Unprotected},
};

/// How the pair runs between checkpoints (design section 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Mode {
    /// COLO proper: the secondary runs on the mirrored input and its output is compared.
    Lockstep,
    /// The secondary is paused at the last checkpoint and costs no CPU; output is released when
    /// the checkpoint that covers it is whole there.
    #[default]
    Standby,
}

/// Which order a checkpoint ends in (spec checkpoint 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum ResumePolicy {
    /// The primary runs on as soon as its state is captured; its new output is held.
    #[default]
    AfterCapture,
    /// QEMU's order: the primary runs on when the secondary has loaded.
    AfterLoad,
}

/// QEMU's `COLOMode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum ColoMode {
    /// Not in COLO.
    #[default]
    None,
    /// Primary of a protected pair.
    Primary,
    /// Secondary of a protected pair.
    Secondary,
}

impl From<Role> for ColoMode {
    fn from(role: Role) -> Self {
        match role {
            Role::Primary => Self::Primary,
            Role::Secondary => Self::Secondary,
        }
    }
}

/// QEMU's `COLOExitReason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum ExitReason {
    /// Never left COLO.
    #[default]
    None,
    /// A failover was requested.
    Request,
    /// An error ended it.
    Error,
    /// A failover is being carried out.
    Processing,
}

/// QEMU's `COLO_EXIT` event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ColoExit {
    /// The role that was left.
    pub mode: ColoMode,
    /// `Request` or `Error`.
    pub reason: ExitReason,
}

/// The failover status machine of spec qemu 16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum FailoverStatus {
    /// No failover.
    #[default]
    None,
    /// Asked for.
    Require,
    /// Being carried out.
    Active,
    /// Done; stays until COLO is entered again.
    Completed,
    /// Met the secondary while it was loading a checkpoint; tried again when that has ended.
    Relaunch,
}

/// The whole status of one machine, plain data.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Status {
    /// Role now.
    pub role: Role,
    /// Whether a failure of either host would be survived: both hosts are in step, write their
    /// records, reach the same arbiter and are fit. Both say the same.
    pub protected: bool,
    /// Why not.
    pub unprotected: Option<Unprotected>,
    /// `query-colo-status` `mode`.
    pub colo_mode: ColoMode,
    /// `query-colo-status` `last-mode`.
    pub last_mode: ColoMode,
    /// `query-colo-status` `reason`.
    pub reason: ExitReason,
    /// Failover status.
    pub failover: FailoverStatus,
    /// Lockstep or standby.
    pub mode: Mode,
    /// What the checkpoint machinery is doing, in a word.
    pub phase: &'static str,
    /// Last complete checkpoint.
    pub epoch: Epoch,
    /// Ownership.
    pub generation: Generation,
    /// State of the ownership protocol (spec ownership 7).
    pub member: MemberState,
    /// Longest interval between checkpoints (`x-checkpoint-delay`).
    pub checkpoint_delay: Duration,
    /// Whether the guest is stopped by an operator.
    pub stopped: bool,
    /// Whether the replica here could take over (secondary only).
    pub replica_valid: bool,
}
