//! What a disk counts.

/// Counters of one disk device since creation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlockMetrics {
    /// Reads done.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes done.
    pub writes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Flushes done.
    pub flushes: u64,
    /// Discards and writes of zeroes done.
    pub trims: u64,
    /// Requests answered with an error: wrong ones and failed ones.
    pub errors: u64,
}
