//! Checkpoints: when ([`Pace`]), and in which phase each side is ([`Source`], [`Target`]).
//!
//! ```text
//! primary   Alone ─▶ SyncHarvesting ⇄ SyncSending ─▶ SyncAwaitingDone ─┐   (rounds, guest running)
//!                            ▲──────────────────────────────────────────┤
//!           Running ─▶ Requesting ─▶ Capturing ─▶ Sending ─▶ AwaitingReceived ─▶ AwaitingLoaded ─▶ Running
//!                                                                     ▲ release covered output
//!
//! secondary Empty ─▶ Synchronising ─┐
//!           Shadowing ─▶ Pausing ─▶ Harvesting ─▶ Replying ─▶ Receiving ─▶ Checking
//!               ▲                                     │ any break: no trace  │ RECEIVED: the commit point
//!               └── LoadingState ◀─ Replicating ◀─ CommittingRam ◀───────────┘ any break: finishes
//! ```

mod pace;
mod source;
mod target;

pub(crate) use pace::Pace;
pub(crate) use source::{LaneEnds, Source, Transaction};
pub(crate) use target::{Announced, Coming, StateBytes, Target, Whole};
