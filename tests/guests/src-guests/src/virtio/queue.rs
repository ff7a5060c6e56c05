//! A split virtqueue whose every chain is named by the index of its first descriptor.

use alloc::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use core::ptr;
use core::sync::atomic::{Ordering, fence};

/// The device writes into this buffer.
pub(crate) const WRITE: u16 = 2;
const NEXT: u16 = 1;
const NO_NOTIFY: u16 = 1;
const NO_INTERRUPT: u16 = 1;

#[derive(Debug)]
pub(crate) struct Queue {
    base: *mut u8,
    size: u16,
    next_available: u16,
    published: u16,
    next_used: u16,
}

impl Queue {
    /// Lays the three parts out as legacy devices expect them; modern ones take any layout.
    pub(crate) fn new(size: u16) -> Self {
        let used = Self::used_offset(size);
        let bytes = used + 6 + 8 * usize::from(size);
        let Ok(layout) = Layout::from_size_align(bytes, 4096) else {
            unreachable!("a 16-bit size always makes a layout")
        };
        // SAFETY: the layout is not empty.
        let base = unsafe { alloc_zeroed(layout) };
        if base.is_null() {
            handle_alloc_error(layout);
        }
        Self {
            base,
            size,
            next_available: 0,
            published: 0,
            next_used: 0,
        }
    }

    fn available_offset(size: u16) -> usize {
        16 * usize::from(size)
    }

    fn used_offset(size: u16) -> usize {
        (Self::available_offset(size) + 6 + 2 * usize::from(size)).next_multiple_of(4096)
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    pub(crate) fn descriptors(&self) -> u64 {
        self.base.addr() as u64
    }

    pub(crate) fn available(&self) -> u64 {
        self.descriptors() + Self::available_offset(self.size) as u64
    }

    pub(crate) fn used(&self) -> u64 {
        self.descriptors() + Self::used_offset(self.size) as u64
    }

    /// Describes one buffer; `next` continues the chain.
    pub(crate) fn describe(
        &mut self,
        index: u16,
        address: u64,
        length: u32,
        flags: u16,
        next: Option<u16>,
    ) {
        let place = 16 * usize::from(index % self.size);
        self.write(place, address);
        self.write(place + 8, length);
        self.write(place + 12, flags | if next.is_some() { NEXT } else { 0 });
        self.write(place + 14, next.unwrap_or(0));
    }

    /// Offers the chain that begins at a descriptor; the device sees it after [`Self::publish`].
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = usize::from(self.next_available % self.size);
        self.write(Self::available_offset(self.size) + 4 + 2 * slot, head);
        self.next_available = self.next_available.wrapping_add(1);
    }

    /// Shows the device what was offered; says whether it wants to be told.
    pub(crate) fn publish(&mut self) -> bool {
        if self.published == self.next_available {
            return false;
        }
        self.published = self.next_available;
        fence(Ordering::SeqCst);
        self.write(Self::available_offset(self.size) + 2, self.next_available);
        // The index must be out before the device's wish is read, or both sides may sleep.
        fence(Ordering::SeqCst);
        let flags: u16 = self.read(Self::used_offset(self.size));
        flags & NO_NOTIFY == 0
    }

    /// Asks the device not to interrupt for this queue.
    pub(crate) fn without_interrupts(&mut self) {
        self.write(Self::available_offset(self.size), NO_INTERRUPT);
    }

    /// Takes a chain that the device is done with: its head and the bytes written.
    pub(crate) fn take_used(&mut self) -> Option<(u16, u32)> {
        let used = Self::used_offset(self.size);
        let index: u16 = self.read(used + 2);
        if index == self.next_used {
            return None;
        }
        fence(Ordering::SeqCst);
        let place = used + 4 + 8 * usize::from(self.next_used % self.size);
        self.next_used = self.next_used.wrapping_add(1);
        let head: u32 = self.read(place);
        Some((head as u16, self.read(place + 4)))
    }

    fn read<T>(&self, offset: usize) -> T {
        // SAFETY: offsets are computed from the size that the allocation was made for, and aligned.
        unsafe { ptr::read_volatile(self.base.wrapping_add(offset).cast()) }
    }

    fn write<T>(&mut self, offset: usize, value: T) {
        // SAFETY: as in `read`; the device reads this part of the queue only.
        unsafe { ptr::write_volatile(self.base.wrapping_add(offset).cast(), value) };
    }
}
