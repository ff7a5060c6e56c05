//! The conformance kit: give it your [`Guest`](crate::Guest) or your [`Vm`](crate::embed::Vm), get a
//! verdict by name. No peer, no network, no second machine.
//!
//! A failover test passes over most faults of a guest's side: a page that is not reported is missed
//! only where the survivor reads it. Here a guest that writes a number and then says it, in bursts,
//! is captured, paused, resumed and loaded while every page is compared.
//!
//! | verdict | what holds |
//! |---|---|
//! | `answers` | each operation is answered once, by its own kind; pausing and resuming twice is harmless |
//! | `pages` | the staged pages of all captures together are RAM as it was at each stop |
//! | `also` | pages that a capture was asked for are staged though they are not dirty |
//! | `still memory` | RAM does not change between a stop and the resume, with client frames waiting too |
//! | `still frames` | nothing is said in that time |
//! | `stamps` | a frame carries the epoch of the last capture before it was said |
//! | `order` | no frame is reported before the capture that it is stamped with |
//! | `cut` | a capture's `inputs` are the frames that the saved state has consumed, no more |
//! | `failed captures` | what a failed capture took from the log is part of the next |
//! | `bytes` | sources and sinks are as long as what was asked for, and an error outside memory |
//! | `damage` | a state that is damaged or cut short is refused, and nothing else happens |
//! | `load` | a state is loaded twice, over a guest that ran, over an older epoch; RAM and numbers go on from there |
//! | `permit` | a frame whose permit has ended does not leave |
//! | `at once` | no call of the loop waits for the guest |
//!
//! Eleven faults are seeded into the fake guest ([`Fault`](crate::guest::fake::Fault)), and each is
//! found under the name that its documentation gives. What cannot be examined here: that an
//! operation of a newer protocol is answered [`Failed`](colo_proto::machine::GuestDone::Failed),
//! because none can be made, and what a device does to storage.

mod checks;
mod kit;
mod vm;

use std::fmt;

use bytes::Bytes;
use colo_proto::id::Slot;

pub use checks::examine;
pub use vm::examine_vm;

/// What the kit has to know of the guest that runs.
///
/// The guest writes a number to RAM, then says it, again and again, each one higher; and it counts
/// the client frames that it hears. Both are little-endian `u64`s.
pub struct Subject {
    /// Slots and their pages.
    pub slots: Vec<(Slot, u64)>,
    /// Where the number is written: slot and byte.
    pub written: (Slot, u64),
    /// Where heard frames are counted.
    pub heard: (Slot, u64),
    /// The number in a frame that the guest said; `None` for other frames.
    pub said: fn(&[u8]) -> Option<u64>,
    /// A client frame that the guest hears.
    pub call: fn() -> Bytes,
    /// How many captures are examined under load.
    pub rounds: u32,
    /// How many frames have left for the world.
    pub left: Option<Box<dyn FnMut() -> u64>>,
    /// Makes the next capture fail.
    pub fail: Option<Box<dyn FnMut()>>,
}

impl fmt::Debug for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subject")
            .field("slots", &self.slots)
            .field("rounds", &self.rounds)
            .finish_non_exhaustive()
    }
}

/// What came of one check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Which, as in the [table](self).
    pub name: &'static str,
    /// What was examined, or what is wrong.
    pub outcome: Result<String, String>,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name;
        match &self.outcome {
            Ok(what) => write!(f, "{name}: ok: {what}"),
            Err(why) => write!(f, "{name}: WRONG: {why}"),
        }
    }
}
