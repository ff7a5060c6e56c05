//! A pair in one process, for tests of what an embedder writes: a [`Guest`] behind a real protocol
//! without a socket, a clock or a VM.
//!
//! [`Pair::run`] lets time pass while everything that the hosts ask for happens at once.
//! The smaller steps ([`Pair::wake`], [`Pair::effect`], [`Pair::send`], [`Pair::receive`]) let a
//! test decide the order, or that something does not happen at all. `examples/pair.rs` tells a
//! story with it; the fuzz target `pair_schedule` lets a fuzzer decide.

mod host;
mod pair;

pub use host::{Effect, Guest, Host};
pub use pair::Pair;
