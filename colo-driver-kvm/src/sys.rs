//! The ioctls and mappings that kvm-ioctls lacks (those of dirty logs are in `capture/sys.rs`), and
//! the kick signal: the only signal handler in the crate.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU8, Ordering, fence};
use std::thread::JoinHandle;

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr, kvm_run};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use crate::capture::sys::{Mapping, outcome};

ioctl_iow_nr!(KVM_X86_SETUP_MCE, KVMIO, 0x9c, u64);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// `KVM_EXIT_DIRTY_RING_FULL`: the ring must be harvested before the vCPU can go on.
pub(crate) const EXIT_DIRTY_RING_FULL: u32 = 31;

/// A second handle on a vCPU's `kvm_run`, for the two fields that others than the thread inside
/// `KVM_RUN` need: kvm-ioctls guards the first handle with `&mut VcpuFd`.
#[derive(Debug)]
pub(crate) struct RunPage(Mapping);

impl RunPage {
    pub(crate) fn new(vcpu: &impl AsRawFd, run_size: usize) -> io::Result<Self> {
        if run_size < size_of::<kvm_run>() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Mapping::new(vcpu.as_raw_fd(), 0, run_size).map(Self)
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        let offset = std::mem::offset_of!(kvm_run, immediate_exit);
        // SAFETY: within the mapping, whose length `new` checked.
        let at = unsafe { self.0.at.add(offset) };
        // SAFETY: a byte of a live shared mapping that everyone, the kernel too, reads and writes
        // as a single byte.
        unsafe { AtomicU8::from_ptr(at.as_ptr()) }
    }

    /// Makes the next `KVM_RUN` (or the current one, once a signal interrupts it) return at once.
    pub(crate) fn set_immediate_exit(&self, on: bool) {
        self.immediate_exit().store(u8::from(on), Ordering::SeqCst);
    }

    /// Width of one access of the port exit that was just reported.
    pub(crate) fn io_size(&self) -> usize {
        let run = self.0.at.cast::<kvm_run>().as_ptr();
        // SAFETY: the mapping holds a kvm_run; a place expression, nothing is read.
        let size = unsafe { &raw const (*run).__bindgen_anon_1.io.size };
        // SAFETY: live and readable; the kernel writes it only inside KVM_RUN on this thread.
        usize::from(unsafe { size.read_volatile() }).max(1)
    }

    /// Sub-reason of the internal-error exit that was just reported.
    pub(crate) fn internal_suberror(&self) -> u32 {
        let run = self.0.at.cast::<kvm_run>().as_ptr();
        // SAFETY: the mapping holds a kvm_run; a place expression, nothing is read.
        let at = unsafe { &raw const (*run).__bindgen_anon_1.internal.suberror };
        // SAFETY: live and readable; the kernel writes it only inside KVM_RUN on this thread.
        unsafe { at.read_volatile() }
    }
}

/// The signal that interrupts `KVM_RUN`.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Installs the handler of the kick signal, which does nothing: that `KVM_RUN` returns is all.
pub(crate) fn install_kick_handler() -> io::Result<()> {
    extern "C" fn kicked(_signal: libc::c_int) {
        // Orders what the kicker wrote before the loop's next look at it.
        fence(Ordering::Acquire);
    }
    // SAFETY: all zero is a valid sigaction: default action, no flags, empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = kicked as *const () as libc::sighandler_t;
    // SAFETY: the handler is async-signal-safe (a fence), `action` outlives the call.
    let code = unsafe { libc::sigaction(kick_signal(), &raw const action, std::ptr::null_mut()) };
    outcome(code)?;
    Ok(())
}

/// Interrupts the thread if it is inside `KVM_RUN`.
pub(crate) fn kick(thread: &JoinHandle<()>) {
    // SAFETY: a handle that has not been joined keeps its pthread_t valid, even after the end.
    let _ended = unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
}

/// Gives a vCPU one bank of machine-check registers instead of the most that KVM has: each bank is
/// four more registers of every checkpoint, and nothing here reports an error through them.
pub(crate) fn one_machine_check_bank(vcpu: &impl AsRawFd) -> io::Result<()> {
    const ONE_BANK: u64 = 1;
    // SAFETY: a vCPU descriptor; KVM reads 8 bytes from the address of `ONE_BANK`.
    outcome(unsafe { ioctl_with_ref(&as_fd(vcpu), KVM_X86_SETUP_MCE(), &ONE_BANK) })?;
    Ok(())
}

/// The vCPU's TSC is the host's plus this.
pub(crate) fn tsc_offset(vcpu: &impl AsRawFd) -> io::Result<u64> {
    let mut offset = 0u64;
    let attr = tsc_offset_attr(&raw mut offset);
    // SAFETY: a vCPU descriptor; KVM writes 8 bytes to the address in `attr`, which is `offset`.
    outcome(unsafe { ioctl_with_ref(&as_fd(vcpu), KVM_GET_DEVICE_ATTR(), &attr) })?;
    Ok(offset)
}

/// Sets [`tsc_offset`].
pub(crate) fn set_tsc_offset(vcpu: &impl AsRawFd, mut offset: u64) -> io::Result<()> {
    let attr = tsc_offset_attr(&raw mut offset);
    // SAFETY: a vCPU descriptor; KVM reads 8 bytes from the address in `attr`, which is `offset`.
    outcome(unsafe { ioctl_with_ref(&as_fd(vcpu), KVM_SET_DEVICE_ATTR(), &attr) })?;
    Ok(())
}

fn tsc_offset_attr(at: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: at.expose_provenance() as u64,
    }
}

fn as_fd(fd: &impl AsRawFd) -> RawFd {
    fd.as_raw_fd()
}

/// The host's wall clock in ns since 1970; 0 if it is set to before.
pub(crate) fn realtime() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(0))
}

/// The host's time-stamp counter.
pub(crate) fn host_tsc() -> u64 {
    // SAFETY: every x86-64 processor has it, and Linux lets user space read it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// The processor this thread runs on just now.
pub(crate) fn processor() -> i32 {
    // SAFETY: no arguments, no memory.
    unsafe { libc::sched_getcpu() }
}
