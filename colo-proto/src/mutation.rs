//! Seeded bugs of the epoch and output side. The simulated world must find each of them; see
//! docs/correctness.md. Those of ownership are in [`member`](crate::member).

/// A rule to break.
#[cfg(feature = "mutations")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bug {
    /// Output leaves at the capture, before VMSTATE_RECEIVED.
    ReleaseBeforeReceived,
    /// A checkpoint counts as whole as soon as its state is here, whatever pages are missing.
    CommitPartial,
    /// The member is told that nothing is in hand while a checkpoint loads (RELAUNCH is dropped).
    SettledWhileLoading,
    /// The secondary's own dirty pages are neither reported nor missed.
    OwnPagesForgotten,
    /// The capture is not told which pages it must copy besides those dirty now.
    CaptureWithoutAlso,
    /// Output said after the capture leaves with the epoch that it is not part of.
    NewOutputWithOld,
    /// Output that the secondary's guest contradicts leaves all the same.
    MismatchIgnored,
    /// What the secondary's guest said before the last checkpoint counts as said after it.
    StaleOutputCompared,
    /// A half-received checkpoint is applied when the peer is lost.
    HalfAppliedOnLoss,
    /// A whole checkpoint is dropped when the peer is lost.
    WholeDroppedOnLoss,
    /// VMSTATE_LOADED leaves before the load began.
    AckBeforeLoaded,
}

/// Whether a bug is seeded. Without the feature constantly false, and the question is not compiled.
macro_rules! seeded {
    ($is:expr) => {{
        #[cfg(feature = "mutations")]
        {
            $is
        }
        #[cfg(not(feature = "mutations"))]
        {
            false
        }
    }};
}
pub(crate) use seeded;

/// Whether the seeded bug is in this machine.
macro_rules! bug {
    ($config:expr, $bug:ident) => {
        crate::mutation::seeded!($config.bug == Some(crate::Bug::$bug))
    };
}
pub(crate) use bug;
