//! What a serial port counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_superio::serial::SerialEvents;

/// Counters of one port since creation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SerialMetrics {
    /// Bytes the guest wrote, muted ones included.
    pub out: u64,
    /// Bytes the guest wrote that the sink refused.
    pub lost: u64,
    /// Bytes of input dropped because too much was waiting.
    pub dropped: u64,
}

/// Counts what vm-superio reports; it wants a shared reference.
#[derive(Debug, Clone, Default)]
pub(super) struct Events(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    out: AtomicU64,
    lost: AtomicU64,
}

impl Events {
    pub(super) fn read(&self, dropped: u64) -> SerialMetrics {
        SerialMetrics {
            out: self.0.out.load(Ordering::Relaxed),
            lost: self.0.lost.load(Ordering::Relaxed),
            dropped,
        }
    }
}

impl SerialEvents for Events {
    fn buffer_read(&self) {}

    fn out_byte(&self) {
        self.0.out.fetch_add(1, Ordering::Relaxed);
    }

    fn tx_lost_byte(&self) {
        self.0.lost.fetch_add(1, Ordering::Relaxed);
    }

    fn in_buffer_empty(&self) {}
}
