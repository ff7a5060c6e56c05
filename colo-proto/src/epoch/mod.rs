//! Checkpoints: when ([`Pace`]), the side that sends them ([`Sender`]) and the side that takes them
//! ([`Receiver`]). Their phases:
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

mod lanes;
mod pace;
mod receiver;
mod sender;
mod source;
mod target;
#[cfg(test)]
mod tests;

pub(crate) use pace::Pace;
pub(crate) use receiver::{Broken, Receiver, Step};
pub(crate) use sender::{Round, Sender};
pub(crate) use source::Transaction;
