//! PCI: one bus behind one host bridge, reached through ECAM and through the ports 0xcf8 and 0xcfc.
//!
//! [`HOST_BRIDGE`] is what the guest's tables must say of it.
//!
//! | file | holds |
//! |---|---|
//! | `root.rs` | [`PciRoot`]: which function answers a configuration access, and where BARs lie |
//! | `registers.rs` | the configuration space of one function |
//! | `msix.rs` | [`Msix`]: the messages of one function |
//!
//! Locks are taken in this order: root, function, device, messages, routes. The MMIO bus's own lock is never held
//! across a call.

mod msix;
pub(crate) mod registers;
mod root;
#[cfg(test)]
mod tests;

use std::ops::Range;

#[cfg(test)]
pub(crate) use msix::test_utils;
pub(crate) use msix::{CONTROL_BITS, ENTRY, MOST_VECTORS, State as MsixState};
pub use msix::{Message, MessageLine, MessageRoutes, Msix};
pub use root::{ConfigPorts, Doorbell, Doorbells, Ecam, Function, MOST_FUNCTIONS, PciRoot};

/// What a guest must be told of the PCI host bridge, for its MCFG and DSDT.
///
/// No function has an interrupt pin: interrupts are MSI-X only, so there is no `_PRT`. The firmware or the kernel may
/// move any BAR inside [`memory`](Self::memory); the memory map must leave that window free and reserve the ECAM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostBridge {
    /// Where ECAM begins: the configuration space of bus 0, 4 KiB for each function.
    pub ecam: u64,
    /// The buses behind the bridge, for MCFG, `_BBN` and `_CRS`.
    pub first_bus: u8,
    /// The same bus: there are no bridges behind it.
    pub last_bus: u8,
    /// Memory that BARs lie in (`_CRS`, 32 bits, not prefetchable).
    pub memory: Range<u64>,
}

impl HostBridge {
    /// Bytes of ECAM: 1 MiB a bus.
    #[must_use]
    pub const fn ecam_len(&self) -> u64 {
        (self.last_bus as u64 - self.first_bus as u64 + 1) << 20
    }
}

/// The host bridge of every machine here: PCI segment 0.
pub const HOST_BRIDGE: HostBridge = HostBridge {
    ecam: 0xd800_0000,
    first_bus: 0,
    last_bus: 0,
    // Where SeaBIOS puts BARs behind this host bridge, too.
    memory: 0xe000_0000..0xfec0_0000,
};
