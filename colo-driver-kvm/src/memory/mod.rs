//! Guest RAM: where it lies, how it is mapped, and how page runs become raw I/O vectors.
//!
//! Guest RAM is never a Rust slice: the guest's processors write it at any time. Contents move
//! through vm-memory's volatile accessors (devices) or as raw I/O vectors and raw copies
//! (checkpoints), never through `&[u8]`.
//!
//! | file | holds |
//! |---|---|
//! | `layout.rs` | the x86 map: RAM around the hole, device windows |
//! | `regions.rs` | [`Memory`]: the slot table, RAM and disks alike |

pub mod layout;
mod regions;

use vm_memory::GuestMemoryMmap;

use crate::capture::OwnLog;
pub use crate::capture::{MemoryError, Staging, StagingError};

pub use layout::{Layout, LayoutError};
pub(crate) use regions::Backing;
pub use regions::{Memory, PageStore};

/// log2 of the page size everything here counts in.
pub const PAGE_SHIFT: usize = crate::capture::PAGE_SHIFT;
/// The page size everything here counts in.
pub const PAGE_SIZE: usize = crate::capture::PAGE_SIZE;

/// Guest RAM as devices see it. Every write through it is logged in the region's [`OwnLog`].
pub type GuestRam = GuestMemoryMmap<OwnLog>;
