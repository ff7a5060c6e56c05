//! Pairs in the simulated world: named scenarios, random schedules, and seeded bugs that those
//! must notice.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "tests"
)]

mod mutations;
mod scenarios;
mod schedules;
