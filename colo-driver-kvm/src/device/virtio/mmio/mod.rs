//! The transport: `device.rs` holds the registers, `event.rs` who is woken when, `state.rs` the life cycle and the
//! section.

mod device;
mod event;
mod state;
#[cfg(test)]
mod tests;

pub use device::Mmio;
