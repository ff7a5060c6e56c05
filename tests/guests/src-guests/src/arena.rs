//! A heap that only grows: what a guest allocates, it allocates when it starts, and keeps.

use core::alloc::{GlobalAlloc, Layout};
use core::ptr;
use core::sync::atomic::{AtomicUsize, Ordering};

/// Between the image and the working set.
const START: usize = 0x100_0000;
const END: usize = 0x200_0000;

struct Arena {
    next: AtomicUsize,
}

#[global_allocator]
static ARENA: Arena = Arena {
    next: AtomicUsize::new(START),
};

// SAFETY: every call gets a range of its own, inside memory that nothing else names.
unsafe impl GlobalAlloc for Arena {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let place = |next: usize| {
            let start = next.next_multiple_of(layout.align());
            start.checked_add(layout.size()).filter(|&end| end <= END)
        };
        match self
            .next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, place)
        {
            Ok(before) => before.next_multiple_of(layout.align()) as *mut u8,
            Err(_) => ptr::null_mut(),
        }
    }

    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}
