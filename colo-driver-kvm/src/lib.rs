//! The machine room: a KVM virtual machine that can be captured while it runs and turned into the
//! copy of another.
//!
//! It owns memory, vCPUs, devices and files, but no loop and no policy: it offers descriptors to
//! wait on and calls to make. [`capture`] alone, without the feature `machine`, serves any VMM.
//!
//! | module | holds |
//! |---|---|
//! | [`caps`] | what we need of KVM, and the message when it is missing |
//! | [`cpuid`] | the processor the guest sees, the same on both hosts |
//! | [`memory`] | guest RAM, the slot table, page runs as I/O vectors, the staging area |
//! | [`dirty`] | which pages changed: KVM's log joined with our own writes |
//! | [`vcpu`] | threads, exits, state of the processors |
//! | [`device`] | everything else the guest sees |
//! | [`state`] | named, versioned, checksummed sections |
//! | [`tap`] | network interfaces of the host |
//! | [`boot`] | kernels of four kinds into memory |
//! | [`vm`] | [`Vm`](vm::Vm): all of it together |
//! | [`capture`] | checkpoints for any VMM: dirty logs, staging, two passes, commit |
//! | [`checkpoint`] | the same for our machine |
//! | [`snapshot`] | a machine in a file |

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("colo-driver-kvm drives KVM on x86-64 Linux only");

#[cfg(feature = "machine")]
pub mod boot;
#[cfg(feature = "machine")]
pub mod caps;
pub mod capture;
#[cfg(feature = "machine")]
pub mod checkpoint;
#[cfg(feature = "machine")]
pub mod cpuid;
#[cfg(feature = "machine")]
pub mod device;
#[cfg(feature = "machine")]
pub mod dirty;
#[cfg(feature = "machine")]
mod generation;
#[cfg(feature = "machine")]
pub mod memory;
#[cfg(feature = "machine")]
pub mod snapshot;
#[cfg(feature = "machine")]
pub mod state;
#[cfg(feature = "machine")]
mod sys;
#[cfg(feature = "machine")]
pub mod tap;
#[cfg(feature = "machine")]
pub mod vcpu;
#[cfg(feature = "machine")]
pub mod vm;
