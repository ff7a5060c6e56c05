//! The machine room: a KVM virtual machine that can be captured while it runs and turned into the
//! copy of another.
//!
//! It owns memory, vCPUs, devices and files, but no loop and no policy: it offers descriptors to
//! wait on and calls to make.
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
//! | [`checkpoint`] | capture, commit |
//! | [`snapshot`] | a machine in a file |

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("colo-driver-kvm drives KVM on x86-64 Linux only");

pub mod boot;
pub mod caps;
pub mod checkpoint;
pub mod cpuid;
pub mod device;
pub mod dirty;
pub mod memory;
pub mod snapshot;
pub mod state;
mod sys;
pub mod tap;
pub mod vcpu;
pub mod vm;
