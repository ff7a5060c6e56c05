//! Ownership in virtual time: who may serve the world, under every fault of the model.
//!
//! * `sim`: two hosts, an arbiter, a network; properties S (one gate) and R (nothing forgotten)
//!   after every event.
//! * `scenarios`: the fault table of spec ownership 9, row by row, with its bounds.
//! * `mutations`: seeded bugs; the random schedules must catch each.
//! * `random`: random schedules. The long run is
//!   `COLO_MEMBER_RUNS=1000000 cargo test --release -p colo-tests --test member random`.

#![expect(clippy::unwrap_used, reason = "all of this binary is a test")]

mod mutations;
mod random;
mod scenarios;
mod sim;
