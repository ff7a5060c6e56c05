//! Pairs in the simulated world: named scenarios, and random schedules.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "tests"
)]

mod scenarios;
mod schedules;
