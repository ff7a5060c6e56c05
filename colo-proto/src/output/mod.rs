//! The output side: what may leave, when, and what the secondary's guest must be told.
//!
//! ```text
//!   primary's guest ─▶ classify ─┬─ pass-through ───────────────────┐
//!                                └─▶ Held ── matched & inputs acked ─┤
//!                                      └──── covered by a checkpoint ┤
//!   secondary's guest ─▶ Comparator ─▲                               ▼
//!                                                    Gate: permit? ─▶ world
//! ```
//!
//! | file | holds |
//! |---|---|
//! | `announce.rs` | frames that tell where the VM lives after a takeover |
//! | `class.rs` | which frames are neither compared nor held |
//! | `compare.rs` | [`Comparator`]: do both guests say the same? |
//! | `held.rs` | output waiting for its release, in order |
//! | `input.rs` | [`InputLog`], [`StoredInputs`]: index, acknowledged-upto, cut, redelivery |
//! | `gate.rs` | the only way out |
//! | `shadow.rs` | what a secondary in lockstep has said and the world may not have heard |

pub mod announce;
mod class;
mod compare;
mod gate;
mod held;
mod input;
mod shadow;

pub(crate) use class::passes;
pub use compare::{Comparator, Compared, Divergence};
pub(crate) use gate::Gate;
pub(crate) use held::Held;
pub use input::{InputLog, Logged, NotStored, StoredInputs};
pub(crate) use shadow::Shadow;
