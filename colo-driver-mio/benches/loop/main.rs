//! The loop's numbers over loopback: round trips on the control channel, alone and beside a RAM
//! lane that is full.
//!
//! `cargo bench -p colo-driver-mio --bench loop`

#![allow(clippy::unwrap_used, reason = "a measurement that cannot go on fails")]

mod flood;

fn main() {
    flood::measure();
}
