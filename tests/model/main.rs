//! Models that drive the real types of the core, exhaustively up to a bound.
//!
//! * `claim`: ownership. Two members, the arbiter's register, a lossy network, crashes.

#![expect(clippy::unwrap_used, reason = "all of this binary is a test")]

mod claim;
mod epoch;
mod guest;
