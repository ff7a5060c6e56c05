//! What a network card counts.

/// Counters of one card since creation. Frames, unless a name says bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct NetMetrics {
    /// Taken out of the transmit ring and handed on.
    pub tx: u64,
    /// Their bytes, without headers of virtio.
    pub tx_bytes: u64,
    /// Taken out and dropped: too short, too long, not in RAM, or sent while the link was down.
    pub tx_dropped: u64,
    /// Put into the receive ring.
    pub rx: u64,
    /// Their bytes, without headers of virtio.
    pub rx_bytes: u64,
    /// Had to wait for a receive buffer.
    pub rx_queued: u64,
    /// Dropped on the way in: no driver, no room in the backlog, too long for the buffer, or link down.
    pub rx_dropped: u64,
}
