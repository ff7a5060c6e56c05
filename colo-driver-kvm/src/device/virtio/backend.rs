//! What the transport asks of the device behind it.

use vmm_sys_util::eventfd::EventFd;

use super::Queues;
use crate::device::LoadError;
use crate::device::codec::{Decoder, Encoder};

/// A virtio device type: everything but the registers.
///
/// All calls come under the device's lock, from a vCPU thread (registers) or from the loop (the device's own calls).
pub trait Backend: Send {
    /// Whether the loop takes requests out of the rings itself ([`Virtio::wake_fd`](super::Virtio::wake_fd) tells it
    /// when). Otherwise they are served where the notification arrives.
    const POLLED: bool = false;
    /// The device type (virtio 1.2 section 5).
    const ID: u32;

    /// Features of the type that this device offers; the transport adds its own.
    fn features(&self) -> u64;
    /// The longest size of each ring.
    fn queue_sizes(&self) -> Vec<u16>;
    /// The configuration space as it is now.
    fn config(&self) -> ConfigSpace;
    /// Keeps `wake`, which brings about a call of [`serve`](Self::serve): for a device that finishes something on a
    /// thread of its own. Called once, before anything else.
    fn connect(&mut self, wake: EventFd) {
        drop(wake);
    }
    /// Serves what is in the rings now, a bounded number of requests. Returns whether some may be left.
    fn serve(&mut self, queues: &mut Queues) -> bool;
    /// Forgets everything about the driver, which resets the device.
    fn reset(&mut self) {}
}

/// The device's part of the state section.
pub(crate) trait Saved: Backend {
    /// The part, decoded and checked.
    type State;
    fn save(&self, encoder: &mut Encoder<'_>);
    /// Changes nothing: `load` decodes everything before it applies anything.
    fn decode(&self, decoder: &mut Decoder<'_>) -> Result<Self::State, LoadError>;
    fn apply(&mut self, state: Self::State);
}

/// A configuration space, at most 64 bytes; what lies behind reads as zero.
#[derive(Debug, Clone, Copy)]
pub struct ConfigSpace([u8; 64]);

impl ConfigSpace {
    /// All zero.
    #[must_use]
    pub fn new() -> Self {
        Self([0; 64])
    }

    /// With `bytes` at `offset`; what does not fit is left out.
    #[must_use]
    pub fn with(mut self, offset: usize, bytes: &[u8]) -> Self {
        let to = self.0.iter_mut().skip(offset);
        to.zip(bytes).for_each(|(to, from)| *to = *from);
        self
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        let from = self.0.iter().skip(offset).chain(std::iter::repeat(&0));
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }
}

impl Default for ConfigSpace {
    fn default() -> Self {
        Self::new()
    }
}
