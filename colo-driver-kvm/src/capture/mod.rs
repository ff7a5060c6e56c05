//! Checkpoints for any VMM: which pages changed, copies of them and of the state, and the way back.
//!
//! Nothing here knows the machine of this crate. A VMM brings three things: [`Vm`], the calls that
//! only it can make; [`Pages`], where its slots lie, for most VMMs a [`Ram`]; and inside
//! [`Vm::harvest`] whatever logs its dirty pages. For that, this module has KVM's bitmap
//! ([`KvmLog`]), KVM's rings ([`Rings`]) and the bitmaps of vm-memory ([`TakeMarks`]).
//!
//! | file | holds |
//! |---|---|
//! | `vm.rs` | [`Vm`]: what a VMM does |
//! | `pages.rs` | [`Pages`], [`Ram`], [`Span`]: raw stretches of memory, found by slot and page |
//! | `log.rs` | [`KvmLog`]: the bitmap with manual protection |
//! | `ring.rs` | [`Rings`]: one ring a vCPU |
//! | `marks.rs` | [`OwnLog`]: pages that the VMM's own devices wrote |
//! | `staging.rs` | [`Staging`]: the pages of one epoch |
//! | `capture.rs` | [`Checkpoint`]: two passes, the state, what is owed after a failure |
//! | `commit.rs` | [`commit`]: received pages into the machine |
//!
//! The features `kvm` (KVM's logs) and `vm-memory` belong to this module; `machine`, on by default,
//! is the rest of the crate.

#[expect(clippy::module_inception, reason = "a capture is what it holds")]
mod capture;
mod commit;
#[cfg(feature = "kvm")]
mod log;
mod marks;
mod pages;
#[cfg(feature = "kvm")]
mod ring;
mod staging;
#[cfg(feature = "kvm")]
pub(crate) mod sys;
mod vm;

pub use capture::{CaptureError, CaptureTimes, Captured, Checkpoint, Passes};
pub use commit::commit;
#[cfg(feature = "kvm")]
pub use log::KvmLog;
pub use marks::{OwnLog, TakeMarks};
pub use pages::{MemoryError, Pages, Ram, Span, iovecs};
#[cfg(feature = "kvm")]
pub use ring::Rings;
pub use staging::{Staging, StagingError};
pub use vm::Vm;

pub(crate) use pages::for_each_run;

/// log2 of the page size everything here counts in.
pub(crate) const PAGE_SHIFT: usize = 12;
/// The page size everything here counts in.
pub(crate) const PAGE_SIZE: usize = 1 << PAGE_SHIFT;

const _: () = assert!(PAGE_SIZE as u64 == colo_proto::id::PAGE_SIZE);
