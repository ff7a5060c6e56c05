//! A 16550 serial port: the first console of every boot path.
//!
//! The registers are vm-superio's; here are input that waits for room in the FIFO, output through a
//! [`Sink`](super::Sink), and the checkpoint life cycle. `device.rs` holds the port and its two sides, `state.rs` its
//! section, `metrics.rs` its counters.

mod device;
mod metrics;
mod state;
#[cfg(test)]
mod test_utils;

pub use device::Serial;
pub use metrics::SerialMetrics;
