//! Frames as the proxy sees them: by offsets, without copies, behind an optional virtio-net header.
//!
//! `etherparse` finds and checks the headers; what it lacks is here: edits in place that keep
//! checksums right, also those that are still to be filled in.
//!
//! | file | holds |
//! |---|---|
//! | `key.rs` | [`FlowKey`]: which conversation, seen from the guest |
//! | `view.rs` | [`View`]: what a frame is and where its parts are |
//! | `tcp.rs` | [`Segment`]: the TCP header with its options |
//! | `edit.rs` | [`Edit`]: changes in place, RFC 1624 |
//! | `fragments.rs` | [`Fragments`]: datagrams put together |

mod edit;
mod fragments;
mod key;
#[cfg(any(test, fuzzing))]
pub(crate) mod sample;
mod tcp;
mod view;

pub use edit::Edit;
pub use fragments::{Fragments, Whole};
pub use key::{FlowKey, Heading};
pub use tcp::{Options, Segment, Timestamp, flag};
pub use view::{Content, Fragment, Unreadable, View};
