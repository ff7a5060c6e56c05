//! How a device interrupts its guest: by one line, or by a message for each ring.

use crate::device::Irq;
use crate::device::pci::Msix;

/// Where the interrupts of a virtio device go.
#[derive(Debug, Clone)]
pub enum Interrupts {
    /// One line for everything; the driver reads the interrupt status and acknowledges it.
    Line(Irq),
    /// Messages: one for the configuration, one for each ring, as the driver assigned them.
    Messages(Msix),
}

impl From<Irq> for Interrupts {
    fn from(line: Irq) -> Self {
        Self::Line(line)
    }
}

impl From<Msix> for Interrupts {
    fn from(messages: Msix) -> Self {
        Self::Messages(messages)
    }
}

impl Interrupts {
    /// The interrupt line, to register as an irqfd; `None` for messages.
    #[must_use]
    pub fn line(&self) -> Option<&Irq> {
        match self {
            Self::Line(line) => Some(line),
            Self::Messages(_) => None,
        }
    }

    pub(super) fn ring(&self, index: usize) {
        match self {
            Self::Line(line) => line.raise(),
            Self::Messages(messages) => messages.raise_ring(index),
        }
    }

    pub(super) fn config(&self) {
        match self {
            Self::Line(line) => line.raise(),
            Self::Messages(messages) => messages.raise_config(),
        }
    }

    pub(super) fn reset(&self) {
        if let Self::Messages(messages) = self {
            messages.unassign();
        }
    }

    pub(super) fn hold(&self) {
        match self {
            Self::Line(line) => line.hold(),
            Self::Messages(messages) => messages.hold(),
        }
    }

    pub(super) fn forget(&self) {
        match self {
            Self::Line(line) => line.forget(),
            Self::Messages(messages) => messages.forget(),
        }
    }

    pub(super) fn release(&self) {
        match self {
            Self::Line(line) => line.release(),
            Self::Messages(messages) => messages.release(),
        }
    }

    /// Raises again what the guest may not have seen. `unacknowledged` is the interrupt status; `loaded` says that
    /// another machine raised it, whose messages may have been on their way when its state was cut. A message cannot
    /// be acknowledged, so all are sent again then.
    pub(super) fn raise_again(&self, unacknowledged: u32, loaded: bool) {
        match self {
            Self::Line(line) if unacknowledged != 0 => line.raise(),
            Self::Messages(messages) if loaded => messages.raise_assigned(),
            _ => {}
        }
    }
}
