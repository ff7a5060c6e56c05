//! Devices: what a guest sees besides its memory and its vCPUs.
//!
//! A device is a plain state machine with no thread and no loop of its own. It is touched from two sides, always
//! under its lock: vCPU threads through [`BusDevice`] (a port or MMIO exit), and the daemon's loop through the
//! device's own calls when one of its descriptors is ready. Between those calls it does nothing, so a device at rest
//! has no transfer in flight.
//!
//! | file | holds |
//! |---|---|
//! | `bus.rs` | [`Bus`]: which device answers which address |
//! | `persist.rs` | [`Persist`]: the checkpoint life cycle, and what may be assumed at each call |
//! | `codec.rs` | the bytes of a state section: little-endian fields and a CRC |
//! | `irq.rs` | [`Irq`]: an interrupt line as an eventfd that can be held during a load |
//! | `sink.rs` | [`Sink`]: where a console's output goes |
//! | `pci/` | the PCI host bridge |
//! | `power.rs`, `rtc.rs` | power switch and button, the clock |
//! | `serial/`, `i8042/` | the legacy devices every boot path expects |
//! | `virtio/` | the virtio-mmio transport, and net, block, rng, console behind it |
//! | `fuzzing.rs` | the body of the `virtio_mmio` fuzz target; the property tests run it too |
//!
//! A guest that programs a device wrongly (descriptor loops, addresses outside RAM, wrong widths) hurts only itself:
//! every call returns after bounded work, and none panics.

mod bus;
mod codec;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod i8042;
mod irq;
pub mod pci;
mod persist;
mod power;
mod rtc;
mod serial;
mod sink;
#[cfg(test)]
mod test_utils;
pub mod virtio;

pub use bus::{Bus, BusDevice, BusError};
pub use i8042::{I8042, ResetLine};
pub use irq::Irq;
pub use persist::{Device, LoadError, Persist};
pub use power::{Power, PowerLine, PowerRequest};
pub use rtc::Rtc;
pub use serial::{Serial, SerialMetrics};
pub use sink::Sink;
