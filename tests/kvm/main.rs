//! Real processes, real KVM: `colod` as it is shipped, killed, frozen and lied to.
//!
//! Each module is a behaviour. All of them run on a [`Stage`](colod::demo::Stage): two
//! hosts on this machine, a switch that remembers who spoke for which address, and a client that
//! checks every byte. Without `/dev/kvm` they print why they are skipped.
//!
//! `COLO_KILLS=300 cargo test -p colo-tests --test kvm kill` is the long campaign; a handful run
//! otherwise. A failure prints the moment of each kill.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod bad_input;
mod clock;
mod cold_start;
mod common;
mod crash;
mod ctl;
mod demo;
mod disk;
mod garbage;
mod interrupt;
mod kill;
mod link;
mod operator;
mod restart;
mod second_secondary;
mod taps;
mod unprotected;
mod zombie;
