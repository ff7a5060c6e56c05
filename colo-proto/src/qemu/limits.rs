//! The bounds of every length, and what this side expects of the sender.

use alloc::{sync::Arc, vec::Vec};

use super::item::{BlockTable, Name};

/// Bounds that hold before anything is allocated (spec qemu 11).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// All RAM blocks together, bytes. Default 64 GiB.
    pub ram: u64,
    /// Number of RAM blocks. Default 1,024.
    pub blocks: usize,
    /// Machine name, bytes. Default and most: 255.
    pub machine: u32,
    /// Description, bytes. Default 16 MiB.
    pub description: u32,
    /// Device sections of the initial stream or of one checkpoint, bytes. Default 64 MiB.
    pub devices: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            ram: 64 << 30,
            blocks: 1024,
            machine: 255,
            description: 16 << 20,
            devices: 64 << 20,
        }
    }
}

/// What this side knows about the sender beforehand; what is not set is taken from the stream.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Expectation {
    /// The machine type, compared whole (spec qemu B14).
    pub machine: Option<Name>,
    /// The VM's UUID, compared if the sender sends one.
    pub uuid: Option<[u8; 16]>,
    /// The RAM blocks: the same names, lengths and order.
    pub blocks: Option<Arc<BlockTable>>,
    /// Names of devices that a checkpoint may lack although the initial stream had them. QEMU
    /// leaves out a device whose state is not needed at the moment; any other absence is refused
    /// (spec qemu 12, row 20).
    pub optional_devices: Vec<Name>,
}
