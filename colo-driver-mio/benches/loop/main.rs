//! The loop's numbers over loopback: what a RAM lane carries beside a plain TCP copy of as much
//! memory, and round trips on the control channel, alone and beside a lane that is full.
//!
//! `cargo bench -p colo-driver-mio --bench loop`

#![allow(clippy::unwrap_used, reason = "a measurement that cannot go on fails")]

mod flood;
mod plain;

fn main() {
    flood::measure();
}
