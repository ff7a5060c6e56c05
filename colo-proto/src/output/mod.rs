//! The output side: what may leave, when, and what the secondary's guest must be told.
//!
//! ```text
//!   primary's guest ─▶ classify ─┬─ pass-through ───────────────────┐
//!                                └─▶ Agreement ── said by both ─────┤
//!                                      └── or covered by checkpoint ─┤
//!   secondary's guest ─▶ Flows ──────▲                  translator ──▼
//!                                                    Gate: permit? ─▶ world
//! ```
//!
//! | file | holds |
//! |---|---|
//! | `outlet.rs` | `Outlet`: may this frame leave? The one answer, in both roles |
//! | `agreement.rs` | output waiting for its release, in order |
//! | `announce.rs` | frames that tell where the VM lives after a takeover |
//! | `class.rs` | which frames are neither compared nor held |
//! | `input.rs` | [`InputLog`], [`StoredInputs`]: index, acknowledged-upto, cut, redelivery |
//! | [`flow`] | [`Flows`](flow::Flows): do both guests say the same in each conversation? |
//! | `gate.rs` | the only way out |
//! | [`packet`] | frames by their parts: views, edits, fragments |
//! | [`translate`] | [`Translator`](translate::Translator): numbers the world knows and numbers the guest uses |
//! | `shadow.rs` | what a secondary in lockstep has said and the world may not have heard |

use bytes::Bytes;

mod agreement;
pub mod announce;
#[cfg(test)]
mod changes;
mod class;
pub mod flow;
mod gate;
mod input;
mod outlet;
pub mod packet;
mod shadow;
pub mod translate;

pub use input::{InputLog, Logged, NotStored, StoredInputs};
pub(crate) use outlet::{News, Outlet, Serving, Shadowing, within_reach};

/// What a frame takes beside its bytes while it is held, about: its handle, its place in a queue,
/// and its allocation. A guest or peer that sends single bytes would else fill sixty times the
/// memory that a bound allows.
pub(crate) const FRAME_COST: usize = 128;

/// What a frame counts against a bound.
pub(crate) const fn weight(frame: &Bytes) -> usize {
    frame.len() + FRAME_COST
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_of_one_byte_are_counted_with_what_holding_them_takes() {
        let bound = 64 << 10;
        let mut gate = gate::Gate::new(bound);
        let mut frames = 0;
        while gate.push(Bytes::from_static(b"x")) {
            frames += 1;
        }
        // A handle alone takes more than the byte.
        assert!(frames * size_of::<Bytes>() < bound, "{frames} frames");
    }
}
