//! The ioctls and mappings that kvm-ioctls lacks, and the kick signal. The only ioctl numbers and
//! the only signal handler in the crate.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::thread::JoinHandleExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering, fence};
use std::thread::JoinHandle;

use kvm_bindings::{
    KVM_DIRTY_LOG_PAGE_OFFSET, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_device_attr, kvm_dirty_gfn, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_run,
};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr, ioctl_iowr_nr};

use crate::memory::PAGE_SIZE;

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// `KVM_EXIT_DIRTY_RING_FULL`: the ring must be harvested before the vCPU can go on.
pub(crate) const EXIT_DIRTY_RING_FULL: u32 = 31;

/// Set by KVM in `kvm_dirty_gfn.flags`: the entry may be harvested.
const GFN_DIRTY: u32 = 1;
/// Set by us: the entry has been harvested.
const GFN_RESET: u32 = 2;

fn outcome(code: libc::c_int) -> io::Result<libc::c_int> {
    if code < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(code)
}

/// Copies a slot's dirty bitmap into `words`, which must have a bit for each of its pages.
/// With manual protection nothing is cleared.
pub(crate) fn dirty_log(vm: BorrowedFd<'_>, slot: u32, words: &mut [u64]) -> io::Result<()> {
    let log = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
            dirty_bitmap: words.as_mut_ptr().cast(),
        },
    };
    // SAFETY: a VM descriptor; KVM writes one bit a page of the slot, rounded up to 8 bytes, and
    // the caller made `words` that long.
    outcome(unsafe { ioctl_with_ref(&vm, KVM_GET_DIRTY_LOG(), &log) })?;
    Ok(())
}

/// Clears and write-protects the pages set in `words`, which begin at page `first` of the slot.
/// `first` is a multiple of 64; `pages` too, unless the range ends with the slot.
pub(crate) fn clear_dirty_log(
    vm: BorrowedFd<'_>,
    slot: u32,
    first: u64,
    pages: u32,
    words: &[u64],
) -> io::Result<()> {
    debug_assert!(u64::from(pages).div_ceil(64) <= words.len() as u64);
    let mut log = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page: first,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: words.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: a VM descriptor; KVM only reads the bitmap, one bit for each of `pages` pages.
    outcome(unsafe { ioctl_with_mut_ref(&vm, KVM_CLEAR_DIRTY_LOG(), &mut log) })?;
    Ok(())
}

/// Re-protects every harvested entry of every ring and frees it. Returns how many there were.
pub(crate) fn reset_dirty_rings(vm: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: a VM descriptor and a call without argument.
    let count = outcome(unsafe { ioctl(&vm, KVM_RESET_DIRTY_RINGS()) })?;
    Ok(count.unsigned_abs())
}

/// A shared mapping of a part of a vCPU descriptor.
#[derive(Debug)]
struct Mapping {
    at: NonNull<u8>,
    len: usize,
}

// SAFETY: memory shared with the kernel; the users below touch it by atomic accesses only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(fd: RawFd, offset: usize, len: usize) -> io::Result<Self> {
        let offset = libc::off_t::try_from(offset)
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: a new mapping at an address the kernel picks.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd,
                offset,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let at = NonNull::new(at.cast()).ok_or_else(io::Error::last_os_error)?;
        Ok(Self { at, len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped, and nobody refers to it any more.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.len) };
    }
}

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

/// One vCPU's dirty ring. The kernel produces entries, we consume them in order.
#[derive(Debug)]
pub(crate) struct Ring {
    map: Mapping,
    entries: u32,
    next: u32,
}

impl Ring {
    /// `entries` is the power of two the capability was enabled with.
    pub(crate) fn new(vcpu: &impl AsRawFd, entries: u32) -> io::Result<Self> {
        let offset = KVM_DIRTY_LOG_PAGE_OFFSET as usize * PAGE_SIZE;
        let len = entries as usize * size_of::<kvm_dirty_gfn>();
        Ok(Self {
            map: Mapping::new(vcpu.as_raw_fd(), offset, len)?,
            entries,
            next: 0,
        })
    }

    /// Hands every waiting entry, as (slot, page), to `each` and marks it harvested. The same page
    /// can come several times.
    pub(crate) fn harvest(&mut self, mut each: impl FnMut(u32, u64)) -> u32 {
        let mut count = 0;
        // One turn at most: entries stay ours until the reset.
        while count < self.entries {
            let at = (self.next & (self.entries - 1)) as usize * size_of::<kvm_dirty_gfn>();
            // SAFETY: `at` is within the mapping: the index is masked to the number of entries.
            let entry = unsafe { self.map.at.add(at) }
                .cast::<kvm_dirty_gfn>()
                .as_ptr();
            // SAFETY: within the entry; a place expression, nothing is read.
            let flags = unsafe { &raw mut (*entry).flags };
            // SAFETY: aligned, live, and everyone accesses the flags atomically.
            let flags = unsafe { AtomicU32::from_ptr(flags) };
            if flags.load(Ordering::Acquire) & GFN_DIRTY == 0 {
                break;
            }
            // SAFETY: the acquire load saw the dirty flag, so the kernel has finished the entry
            // and leaves it alone until it is reset.
            let gfn = unsafe { entry.read_volatile() };
            each(gfn.slot, gfn.offset);
            flags.store(GFN_RESET, Ordering::Release);
            self.next = self.next.wrapping_add(1);
            count += 1;
        }
        count
    }
}

impl Ring {
    /// Whether a harvest of so many entries means that KVM ran over the end: it stops the vCPU while
    /// some are still free.
    pub(crate) fn overflowed(&self, harvested: u32) -> io::Result<()> {
        if harvested < self.entries {
            return Ok(());
        }
        Err(overflow())
    }
}

/// The error for a ring that lost entries.
pub(crate) fn overflow() -> io::Error {
    io::Error::other("the dirty ring overflowed: choose a larger one, or the bitmap")
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
