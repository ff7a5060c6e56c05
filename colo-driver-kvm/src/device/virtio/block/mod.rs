//! The disk (virtio 1.2 section 5.2): one ring, served where the notification arrives, over a [`Disk`].
//!
//! `disk.rs` holds the file and which of its pages were written, `device.rs` what the guest sees, `event.rs` the
//! requests, `state.rs` the section's field, `metrics.rs` the counters.

mod device;
mod disk;
mod event;
mod flush;
mod metrics;
mod state;
#[cfg(test)]
mod tests;

pub use device::Block;
pub use disk::{Disk, DiskError};
pub use metrics::BlockMetrics;
