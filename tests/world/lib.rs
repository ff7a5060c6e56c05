//! Two hosts, one seed, a fake clock: the deterministic world that drives the real
//! [`Node`](colo_proto::node::Node)s.
//!
//! * [`world`]: hosts, connections, arbiter, faults, and what is checked after every step
//! * [`guest`]: the toy guest, and contents of pages
//!
//! Every client frame that a guest consumes extends a hash over its whole history, and its reply
//! shows that hash. So output commit is one question, asked at every frame that leaves: does the
//! history it shows contain every history that was ever shown?

#![allow(
    clippy::expect_used,
    clippy::missing_panics_doc,
    missing_debug_implementations,
    clippy::collapsible_match,
    reason = "for tests: what cannot go on fails"
)]

pub mod guest;
pub mod world;
