//! To be written.

pub mod config;
pub mod control;
pub mod demo;
pub mod frame_socket;
pub mod qemu;
