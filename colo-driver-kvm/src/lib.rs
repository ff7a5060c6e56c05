//! The machine room: a KVM virtual machine that can be captured while it runs and turned into the
//! copy of another.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("colo-driver-kvm drives KVM on x86-64 Linux only");

pub mod device;
pub mod dirty;
pub mod memory;
pub mod tap;
