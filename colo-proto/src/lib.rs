//! The protocol of colo, without any I/O.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod command;
pub mod error;
pub mod event;
pub mod id;
pub mod machine;
pub mod member;
pub mod net;
pub mod qemu;
pub mod ram;
pub mod stats;
pub mod status;
pub mod time;

/// What goes over the wire.
pub mod wire {
    pub mod join;
}
