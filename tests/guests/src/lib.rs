//! Small guests for tests, benchmarks and the demo, as ELF images.
//!
//! Each boots by multiboot or PVH, in our own VMM and in QEMU (`-M pc`, `-M microvm`), logs on
//! COM1, halts when it has nothing to do, and keeps counters in the page at
//! [`stats::ADDRESS`]. What they take on the command line and how memory is laid out is in
//! this package's README; the sources are in `src-guests`.

/// Dirties pages at a given rate and checks that every page is what it last wrote there.
///
/// `pages=256` pages every `period_us=10000` microseconds, round-robin over `ws=4096` pages from
/// [`DIRTY_BASE`] on; `verify=N` pages checked per period (default as many as written, at least
/// 16); `quiet=1` for no line each second. Prints `dirty: ready …`, then `dirty: t=…` each second,
/// and `dirty: CORRUPT …` when a page is not what it should be.
pub const DIRTY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/dirty"));

/// Guest-physical address of the first page of the `dirty` guest's working set.
pub const DIRTY_BASE: u64 = 0x200_0000;

/// The counters every guest keeps, each a little-endian `u64` in guest RAM.
pub mod stats {
    /// Guest-physical address of the page of counters.
    pub const ADDRESS: u64 = 0x1000;
    /// What the guest makes progress in: iterations, requests, generations.
    pub const PROGRESS: u64 = ADDRESS;
    /// Pages, bytes or sectors written.
    pub const WRITTEN: u64 = ADDRESS + 8;
    /// Self-checks that failed; anything but 0 is a broken host.
    pub const ERRORS: u64 = ADDRESS + 16;
    /// Self-checks made.
    pub const VERIFIED: u64 = ADDRESS + 24;
    /// ASCII `COLO` and the guest's kind (`DIRT`, `SERV`, `DISK`), written when it is ready.
    pub const MAGIC: u64 = ADDRESS + 32;
    /// Microseconds since the guest started, as of its last update.
    pub const MICROS: u64 = ADDRESS + 40;
}
