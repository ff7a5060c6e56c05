//! Models that drive the real types of the core, exhaustively up to a bound.
//!
//! * `claim`: ownership. Two members, the arbiter's register, a lossy network, crashes.
//! * `epoch`: checkpoints. A primary and a secondary, cuts within messages, a crash, an operator;
//!   `guest` is their guest, whose frames are its history.
//!
//! Each has its rules in its file, and the systems that are explored in `systems.rs` beside it.

#![expect(clippy::unwrap_used, reason = "all of this binary is a test")]

mod claim;
mod epoch;
mod guest;
