//! Small guests for tests, benchmarks and the demo, as ELF images.
//!
//! Each boots by multiboot or PVH, and turned by [`bzimage()`] into one as a Linux kernel does, in our own VMM and in QEMU (`-M pc`, `-M microvm`), logs on
//! COM1, halts when it has nothing to do, and keeps counters in the page at
//! [`stats::ADDRESS`]. What they take on the command line and how memory is laid out is in
//! this package's README; the sources are in `src-guests`.

mod bzimage;

pub use bzimage::{bzimage, without_multiboot};

/// Dirties pages at a given rate and checks that every page is what it last wrote there.
///
/// `pages=256` pages every `period_us=10000` microseconds, round-robin over `ws=4096` pages from
/// [`DIRTY_BASE`] on; `verify=N` pages checked per period (default as many as written, at least
/// 16); `quiet=1` for no line each second. Prints `dirty: ready …`, then `dirty: t=…` each second,
/// and `dirty: CORRUPT …` when a page is not what it should be.
pub const DIRTY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/dirty"));

/// Guest-physical address of the first page of the `dirty` guest's working set.
pub const DIRTY_BASE: u64 = 0x200_0000;

/// An HTTP/1.1 server on port 80, over virtio-net (MMIO or PCI).
///
/// `ip=10.0.2.15/24 gw=10.0.2.2`; the card is the first of `virtio_mmio.device=4K@BASE:IRQ` (any
/// number of them, as on a Linux command line), or of the places where QEMU's `microvm` puts them;
/// its address is the device's. `seed=N` goes into the guest's random numbers besides the
/// time-stamp counter. `pages=P period_us=T ws=W verify=N` add the work of [`DIRTY`] (off by
/// default), `quiet=1` takes away the line each second in which something happened. Prints
/// `server: ready ip=…` when it answers.
///
/// | request | answer |
/// |---|---|
/// | `GET /`, `GET /counter` | the number of requests so far, this one included |
/// | `POST /echo` | the body |
/// | `GET /bytes/N` | N bytes, byte `i` being [`server_byte(i)`](server_byte) |
/// | `GET /random` | 32 hexadecimal digits that no other machine would draw |
/// | `GET /sha256?n=K` | SHA-256 applied K times (1, at most a million) to 32 zero bytes |
/// | `GET /selfcheck` | `written=… verified=… errors=…` of the added work, or `off` |
///
/// Every request increments the counter; every response carries it as `X-Counter`.
pub const SERVER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/server"));

/// Byte `index` of what [`SERVER`] answers to `GET /bytes/N`.
#[must_use]
pub fn server_byte(index: u64) -> u8 {
    (index ^ index >> 8 ^ index >> 16).to_le_bytes()[0]
}

/// Writes and reads back a region of the first virtio-blk disk (MMIO or PCI), and checks that
/// every block is what it last wrote there.
///
/// `writes=8` blocks of 4096 bytes written and `reads=8` read back every `period_us=10000`
/// microseconds, each round-robin over the first `blocks=1024`; a flush each `flush_every=16`
/// periods (0: never); `quiet=1` as in [`DIRTY`]; devices as in [`SERVER`]. The whole region is
/// written once before the guest prints `disk: ready …`; then it prints `disk: t=…` each second,
/// `disk: CORRUPT …` for a wrong block, `disk: IO ERROR …` for a failed request.
///
/// A block is 512 little-endian `u64`: its index, its generation (1 for the first fill, one more
/// per write), a checksum of all words but this one (`sum = rotl(sum, 7) ^ word`, in order), and
/// a pattern.
pub const DISK: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/disk"));

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
