//! The network card (virtio 1.2 section 5.1): one pair of rings, no thread.
//!
//! The loop takes frames out with [`Virtio::poll_tx`](super::Virtio::poll_tx), each with the epoch it belongs to, and
//! brings frames in with [`Virtio::rx`](super::Virtio::rx), each with its index in the input log. `device.rs` holds what
//! the card is, `event.rs` both directions, `state.rs` its fields of the section, `metrics.rs` its counters.

mod device;
mod event;
mod metrics;
mod state;
#[cfg(test)]
mod tests;

pub use device::{Net, NetConfig, Offloads, VNET_HEADER};
pub use event::RxOutcome;
pub use metrics::NetMetrics;
