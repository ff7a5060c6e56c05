//! Virtio over MMIO and PCI (virtio 1.2 sections 2, 4.1, 4.2 and 5), with split rings.
//!
//! ```text
//!   vCPU: registers ─▶ Virtio ─▶ Backend::serve ─▶ Queues ─▶ Ring, Chain ─▶ guest RAM (writes are logged)
//!   loop: wake_fd   ─▶ Virtio<Net>::poll_tx, rx  ─▶ Queues …             └▶ Irq
//! ```
//!
//! | file | holds |
//! |---|---|
//! | `device/` | [`Virtio`]: negotiation, rings, reset, the life cycle and the section of every virtio device |
//! | `mmio.rs`, `pci/` | the two transports: registers in front of a [`Virtio`] |
//! | `interrupts.rs` | [`Interrupts`]: a line, or messages |
//! | `backend.rs` | [`Backend`]: what the transport asks of a device type |
//! | `queues.rs` | [`Queues`]: what a device type works with; when guest memory may be touched |
//! | `ring.rs`, `chain.rs` | one split ring; one request of it |
//! | `net/` | the network card: frames out under an epoch, frames in with an index |
//! | `block/` | the disk, over an image that knows which of its pages were written |
//! | `rng.rs`, `console.rs` | entropy; lines out and in |
//! | `test_utils.rs` | a driver for the tests, which speaks through the registers and its own RAM |
//!
//! Rules of work: a call serves at most a ring of requests, a request has at most 256 buffers, and each device type
//! bounds the bytes of one. A ring that makes no sense (an index that jumps, a head out of range) breaks the device
//! until the guest resets it; a request that makes no sense is completed empty or with an error.

mod backend;
mod block;
mod chain;
mod console;
mod device;
mod interrupts;
mod mmio;
mod net;
mod pci;
mod queues;
mod ring;
mod rng;
#[cfg(test)]
mod test_utils;

#[cfg(any(test, fuzzing))]
pub(super) use backend::Saved as SavedDevice;
pub use backend::{Backend, ConfigSpace};
pub use block::{Block, BlockMetrics, Disk, DiskError};
pub use console::Console;
pub use device::Virtio;
pub use interrupts::Interrupts;
pub use net::{Net, NetConfig, NetMetrics, Offloads, RxOutcome, VNET_HEADER};
pub use pci::VirtioPci;
pub use queues::Queues;
pub use rng::Rng;
