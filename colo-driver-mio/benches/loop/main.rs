//! The loop's numbers over loopback: what a RAM lane carries beside a plain TCP copy of as much
//! memory, round trips on the control channel, alone and beside a lane that is full, and the first
//! synchronisation of two nodes.
//!
//! `cargo bench -p colo-driver-mio --bench loop`

#![allow(clippy::unwrap_used, reason = "a measurement that cannot go on fails")]

mod flood;
mod plain;
mod sync;

fn main() {
    flood::measure();
    sync::measure();
}
