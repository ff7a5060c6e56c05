//! Zeroed memory that is taken page by page as it is written, and whose absence is an error.
//!
//! `Vec` would end the process when the system refuses the size that a primary announces.

use std::{
    fmt, io,
    ops::{Deref, DerefMut},
    ptr::NonNull,
    slice,
};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// A private anonymous mapping.
pub(super) struct Region {
    start: NonNull<u8>,
    length: usize,
}

impl Region {
    /// `length` zero bytes.
    pub(super) fn zeroed(length: usize) -> io::Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), length, protection, flags) }?;
        let start = NonNull::new(start.cast())
            .ok_or_else(|| io::Error::other("the kernel mapped the null page"))?;
        Ok(Self { start, length })
    }
}

impl Deref for Region {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is `length` readable, initialised bytes, lives as long as `self`, and
        // is shared with nobody: no VM and no other process maps it.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl DerefMut for Region {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, writable, and `&mut self` excludes every other slice of it.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the whole mapping, made by `zeroed`; no slice of it outlives `self`.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.length) };
        debug_assert!(unmapped.is_ok(), "a mapping of ours can be unmapped");
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region of {} bytes", self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_zero_writable_and_refused_when_absurd() {
        let mut region = Region::zeroed(3 << 12).unwrap();
        assert!(region.iter().all(|b| *b == 0));
        region[1 << 12] = 7;
        assert_eq!(region[1 << 12], 7);
        Region::zeroed(1 << 60).unwrap_err();
    }
}
