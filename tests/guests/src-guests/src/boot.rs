//! From the first instruction in ring 3 to the guest's main function.

use core::arch::global_asm;
use core::panic::PanicInfo;

use crate::clock::Clock;
use crate::cmdline::CommandLine;
use crate::{cpu, interrupts, println};

global_asm!(include_str!("boot.S"), options(att_syntax));

const MULTIBOOT: u32 = 0x2BAD_B002;
const PVH: u32 = 0x336E_C578;
const BZIMAGE: u32 = u32::from_le_bytes(*b"HdrS");

unsafe extern "C" {
    #[expect(improper_ctypes, reason = "both ends are Rust")]
    fn guest_main(boot: &'static Boot) -> !;
}

/// What the loader and the start-up code found out.
#[derive(Debug)]
#[repr(C)]
pub struct Boot {
    /// The command line.
    pub cmdline: CommandLine,
    /// The calibrated clock.
    pub clock: Clock,
    /// First byte above the memory that starts at 1 MiB, as far as the loader told.
    pub memory_end: Option<u64>,
}

#[unsafe(no_mangle)]
extern "C" fn guest_start(magic: u32, info: u32) -> ! {
    static mut BOOT: Option<Boot> = None;

    interrupts::install();
    crate::console::init();
    let (cmdline, memory_end) = loader_info(magic, info.into());
    if let Some((start, length)) = ramdisk(magic, info.into()) {
        let sum = (start..start + length).fold(0u64, |sum, at| sum + u64::from(cpu::peek8(at)));
        println!("guest: ramdisk of {length} bytes, sum {sum}");
    }
    let clock = Clock::calibrate(cmdline.number("tsc_khz"));
    interrupts::enable();

    let slot = &raw mut BOOT;
    // SAFETY: this runs once, on the only processor, before anything else can name BOOT.
    let boot = unsafe {
        (*slot).insert(Boot {
            cmdline,
            clock,
            memory_end,
        })
    };
    // SAFETY: `entry!` defines it with this signature.
    unsafe { guest_main(boot) }
}

fn loader_info(magic: u32, info: u64) -> (CommandLine, Option<u64>) {
    if magic == MULTIBOOT {
        let flags = cpu::peek32(info);
        let memory_end = (flags & 1 != 0)
            .then(|| 0x10_0000 + u64::from(cpu::peek32(info + 8)) * 1024)
            .map(|end| end.min(0xC000_0000));
        let text = if flags & 4 != 0 {
            cpu::peek32(info + 16).into()
        } else {
            0
        };
        (CommandLine::copy_from(text), memory_end)
    } else if cpu::peek32(info) == PVH {
        (
            CommandLine::copy_from(cpu::peek64(info + 24)),
            pvh_memory_end(info),
        )
    } else if magic == BZIMAGE {
        // Entered from real mode it has no memory map: that would take the BIOS.
        let entries = info + 0x2D0;
        let count = u64::from(cpu::peek8(info + 0x1E8)).min(64);
        (
            CommandLine::copy_from(cpu::peek32(info + 0x228).into()),
            memory_end((0..count).map(|i| entries + i * 20)),
        )
    } else {
        (CommandLine::copy_from(0), None)
    }
}

/// Where the initial ramdisk lies (multiboot: the first module), and its length.
fn ramdisk(magic: u32, info: u64) -> Option<(u64, u64)> {
    let word = |at: u64| u64::from(cpu::peek32(at));
    let (start, length) = if magic == MULTIBOOT {
        if cpu::peek32(info) & 8 == 0 || cpu::peek32(info + 20) == 0 {
            return None;
        }
        let module = word(info + 24);
        (word(module), word(module + 4) - word(module))
    } else if magic == BZIMAGE {
        (word(info + 0x218), word(info + 0x21C))
    } else if cpu::peek32(info) == PVH && cpu::peek32(info + 12) > 0 {
        let module = cpu::peek64(info + 16);
        (cpu::peek64(module), cpu::peek64(module + 8))
    } else {
        return None;
    };
    (length > 0).then_some((start, length))
}

/// The end of the memory map entry that holds 1 MiB.
fn pvh_memory_end(info: u64) -> Option<u64> {
    let version = cpu::peek32(info + 4);
    if version < 1 {
        return None;
    }
    let map = cpu::peek64(info + 40);
    let entries = cpu::peek32(info + 48).min(64);
    memory_end((0..u64::from(entries)).map(|i| map + i * 24))
}

/// The end of the entry that holds 1 MiB; each is a start, a size and a kind, 1 being memory.
fn memory_end(mut entries: impl Iterator<Item = u64>) -> Option<u64> {
    entries.find_map(|entry| {
        let (start, size) = (cpu::peek64(entry), cpu::peek64(entry + 8));
        let is_ram = cpu::peek32(entry + 16) == 1;
        let end = start.checked_add(size)?;
        (is_ram && start <= 0x10_0000 && end > 0x10_0000).then_some(end.min(0xC000_0000))
    })
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    println!("guest: PANIC {info}");
    cpu::stop()
}
