//! The protocol of colo, without any I/O.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod id;
pub mod member;
pub mod net;
pub mod qemu;
pub mod ram;
pub mod time;
