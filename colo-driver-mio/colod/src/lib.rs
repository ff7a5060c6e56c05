//! `colod`, the daemon: [`colo_driver_mio`]'s loop around a KVM virtual machine.
//!
//! | module | holds |
//! |---|---|
//! | [`cli`] | the command line: one file for each command |
//! | [`config`] | the configuration file, checked |
//! | [`control`] | the control socket: server, client, and what crosses it |
//! | [`demo`] | two hosts, a network and a client on one machine, for the demo and for tests |
//! | [`qemu`] | `inspect`, `standby` and `feed`: beside an unmodified QEMU |
//! | `kvm` | the guest behind the loop |
//! | `observe` | metrics, the status page, the stream of events |

pub mod cli;
pub mod config;
pub mod control;
pub mod demo;
mod kvm;
mod observe;
pub mod qemu;
