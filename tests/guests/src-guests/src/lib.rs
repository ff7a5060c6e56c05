//! What every guest stands on: a way from the loader to ring 3, a console, a clock that can wake
//! the processor, interrupts, and a page of counters that the host can read.
//!
//! A guest is a binary of this package that says [`entry!`]`(main)`. It runs in ring 3 with I/O
//! privilege level 3, interrupts are taken by a few instructions in ring 0 (`boot.S`), and it halts
//! through a software interrupt when it has nothing to do. All memory below 4 GiB is mapped one to
//! one and writable, so physical addresses are pointers.
#![no_std]

extern crate alloc;

mod arena;
pub mod boot;
pub mod clock;
pub mod cmdline;
pub mod console;
pub mod cpu;
pub mod entropy;
pub mod interrupts;
mod libc_symbols;
pub mod pattern;
pub mod stats;
pub mod virtio;
pub mod working_set;

pub use boot::Boot;

/// Names the guest's main function: `fn(&Boot) -> !`.
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        #[unsafe(no_mangle)]
        extern "C" fn guest_main(boot: &'static $crate::Boot) -> ! {
            $main(boot)
        }
    };
}
