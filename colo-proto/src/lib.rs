//! The protocol of colo, without any I/O: fault tolerance for virtual machines as state machines.
//!
//! **What it is.** Two hosts, one VM. A [`Primary`](primary::Primary) runs the guest; a
//! [`Secondary`](secondary::Secondary) holds its last checkpoint and takes over. A
//! [`Node`](node::Node) is a host, whichever of the two it is now. Each is a
//! [`Machine`](machine::Machine): what happens is an argument, what to do is handed out.
//!
//! **What it is not.** It has no clock, no socket, no thread and no guest: `no_std` makes the
//! compiler refuse them. Page contents never enter it.
//!
//! Reading order: [`machine`] (the contract), [`node`], [`primary`], [`secondary`], then
//! [`member`] (who owns the VM), [`wire`] (the messages), [`output`] (what may leave), [`ram`].
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
pub mod output;
mod ownership;
mod pairing;
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
