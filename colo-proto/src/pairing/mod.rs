//! First contact between the two hosts, and the channels that come of it.
//!
//! | file | holds |
//! |---|---|
//! | `accept.rs` | [`Accept`]: the primary takes a peer that said hello in time and fits |
//! | `dial.rs` | [`Dial`]: the secondary seeks its primary, soon or later and later |
//! | `link.rs` | [`Link`]: the channels, their last words, and what may not stand still |
//! | `lane.rs` | one channel: what it reads, what waits on it |

mod accept;
mod dial;
mod lane;
mod link;

pub(crate) use accept::{Accept, Unfit};
pub(crate) use dial::Dial;
pub(crate) use lane::Item;
pub(crate) use link::{FRAMES_STUCK, Link};
