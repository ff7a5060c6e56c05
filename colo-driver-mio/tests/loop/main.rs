//! The loop against a scripted machine and a fake guest, over real sockets.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on fails"
)]

mod bytes_move;
mod joining;
mod pressure;
mod script;
mod sides;
