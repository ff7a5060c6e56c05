//! The protocol of colo, without any I/O: fault tolerance for virtual machines as state machines.
//!
//! Two hosts, one VM. A primary runs the guest; a secondary holds its last checkpoint and takes over.
//! A [`Node`](node::Node) is one host, whichever of the two it is now.
//!
//! ```text
//!                 inputs                       ┌──────────────────────────┐  outputs
//!  sockets ─▶ Bytes Placed Frame Sent Up Down ─▶│ Node: Primary, Secondary │─▶ Transmit, Demand, Dial
//!  guest   ─▶ Dirty FromGuest Guest(done) ─────▶│   epoch    checkpoints   │─▶ Guest(op), ToGuest
//!  world   ─▶ FromWorld ───────────────────────▶│   output   what may leave│─▶ ToWorld + permit
//!  peers   ─▶ Datagram, Arbiter, Persisted ────▶│   member   who owns it   │─▶ Datagram, AskArbiter, Persist
//!  people  ─▶ Command ─────────────────────────▶│   operator what they want│─▶ Answer, Event
//!  clock   ─▶ Timeout ─────────────────────────▶│   pairing  first contact │─▶ one Deadline
//!                                               └──────────────────────────┘
//! ```
//!
//! # The loop
//!
//! One [`handle_input`](machine::Machine::handle_input), then
//! [`poll_output`](machine::Machine::poll_output) until `None`, then `poll_transmit` and
//! `poll_demand` for every channel, then one timer from `poll_timeout`. The contract stands in
//! [`machine`]; `examples/pair.rs` runs two hosts in one process.
//!
//! # The names a user needs
//!
//! | name | is |
//! |---|---|
//! | [`Config`](config::Config) | everything that is decided before the start |
//! | [`Node`](node::Node), [`Start`](node::Start) | a host, and how it starts |
//! | [`Machine`](machine::Machine) | the contract with whoever drives it |
//! | [`Input`](machine::Input) | what happened |
//! | [`Output`](machine::Output) | what to do |
//! | [`GuestOp`](machine::GuestOp), [`GuestDone`](machine::GuestDone) | what the guest is asked for, and how it ended |
//! | [`Transmit`](machine::Transmit), [`Demand`](machine::Demand) | what to send, and what the next bytes are for |
//! | [`Command`](command::Command) | what an operator can ask |
//! | [`Event`](event::Event), [`Status`](status::Status) | what happened, for people |
//! | [`MemberConfig`](member::MemberConfig) | how the two hosts agree on who owns the VM |
//!
//! # What it is not
//!
//! It has no clock, no socket, no thread and no guest: `no_std` makes the compiler refuse them. Page
//! contents never enter it.
//!
//! Reading order inside: [`node`], [`primary`], [`secondary`], then [`member`] (who owns the VM),
//! [`wire`] (the messages), [`output`] (what may leave), [`ram`].
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod base;
pub mod command;
pub mod config;
mod epoch;
pub mod error;
pub mod event;
mod failover;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod guest_ops;
pub mod id;
pub mod machine;
pub mod member;
mod mutation;
pub mod node;
mod operation;
mod operator;
pub mod output;
mod ownership;
mod pairing;
mod protection;
pub mod qemu;
pub mod ram;
mod roles;
pub mod stats;
pub mod status;
pub mod testing;
pub mod time;
pub mod wire;

pub use roles::{primary, secondary};

#[cfg(feature = "mutations")]
pub use mutation::Bug;
