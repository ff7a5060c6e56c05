//! What is the same on every transport: `negotiation.rs` holds features, rings and reset, `event.rs` who is woken when,
//! `state.rs` the life cycle and the section.

mod event;
mod negotiation;
mod state;
#[cfg(test)]
mod tests;

pub use negotiation::Virtio;
