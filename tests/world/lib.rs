//! Two hosts, one seed, a fake clock: the deterministic world that drives the real
//! [`Node`](colo_proto::node::Node)s.
//!
//! * [`world`]: the loop: what happens next, and to whom
//! * [`setup`]: how a world is set up, and what is counted
//! * [`host`]: a process, what outlives it, and how it carries out what its machine wants
//! * [`guest`]: the toy guest; `operation`: what is done with it
//! * `clock`: the hosts' clocks; `disk`: a guest's disk and its replication
//! * `connection`: bytes and pages in order on each channel
//! * `client`: the client, and the oracle of output commit
//! * `fault`: what goes wrong
//! * `check`: what must hold after every step
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

mod check;
mod client;
mod clock;
mod connection;
mod disk;
pub mod fault;
pub mod guest;
pub mod host;
mod operation;
pub mod setup;
pub mod world;

pub use setup::{Counts, Setup};
pub use world::World;
