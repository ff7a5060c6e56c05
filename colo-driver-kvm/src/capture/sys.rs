//! The ioctls and mappings of KVM's dirty logs.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_DIRTY_LOG_PAGE_OFFSET, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_gfn, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1,
    kvm_enable_cap,
};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr, ioctl_iowr_nr};

use super::PAGE_SIZE;

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iow_nr!(KVM_ENABLE_CAP, KVMIO, 0xa3, kvm_enable_cap);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// Set by KVM in `kvm_dirty_gfn.flags`: the entry may be harvested.
const GFN_DIRTY: u32 = 1;
/// Set by us: the entry has been harvested.
const GFN_RESET: u32 = 2;

pub(crate) fn outcome(code: libc::c_int) -> io::Result<libc::c_int> {
    if code < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(code)
}

/// Turns on manual protection of the dirty bitmap, with every page dirty at the start of logging so
/// that switching it on write-protects nothing.
pub(crate) fn enable_manual_protect(vm: BorrowedFd<'_>) -> io::Result<()> {
    let flags = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
    let cap = kvm_enable_cap {
        cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        args: [u64::from(flags), 0, 0, 0],
        ..Default::default()
    };
    // SAFETY: a VM descriptor; KVM only reads the structure.
    outcome(unsafe { ioctl_with_ref(&vm, KVM_ENABLE_CAP(), &cap) })?;
    Ok(())
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
pub(crate) struct Mapping {
    pub(crate) at: NonNull<u8>,
    len: usize,
}

// SAFETY: memory shared with the kernel; the users below touch it by atomic accesses only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(crate) fn new(fd: RawFd, offset: usize, len: usize) -> io::Result<Self> {
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
