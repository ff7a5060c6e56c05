//! From the first instruction in ring 3 to the guest's main function.

use core::arch::global_asm;
use core::panic::PanicInfo;

use crate::clock::Clock;
use crate::cmdline::CommandLine;
use crate::{cpu, interrupts, println};

global_asm!(include_str!("boot.S"), options(att_syntax));

const MULTIBOOT: u32 = 0x2BAD_B002;
const PVH: u32 = 0x336E_C578;

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
    } else {
        (CommandLine::copy_from(0), None)
    }
}

/// The end of the memory map entry that holds 1 MiB.
fn pvh_memory_end(info: u64) -> Option<u64> {
    let version = cpu::peek32(info + 4);
    if version < 1 {
        return None;
    }
    let map = cpu::peek64(info + 40);
    let entries = cpu::peek32(info + 48).min(64);
    (0..u64::from(entries))
        .map(|i| map + i * 24)
        .find_map(|entry| {
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
