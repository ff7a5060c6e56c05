//! What each kind of kernel wants to be told: command line, ramdisk, memory map.

use linux_loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::IntoBytes;

use super::BootError;
use super::loader::{Loaded, Setup};
use super::tables::Entry;
use crate::memory::layout::{HOLE_END, HOLE_START};
use crate::memory::{GuestRam, Layout};

/// Start info, multiboot info or boot parameters.
const INFO: u64 = 0x7000;
/// Module list behind a start info or multiboot info.
const MODULES: u64 = INFO + 0x100;
/// Memory map behind it.
const MAP: u64 = INFO + 0x200;
/// The command line.
const CMDLINE: u64 = 0x2_0000;
/// End of memory that a BIOS would leave free.
pub(super) const BASE_END: u64 = 0x9_fc00;
/// Where memory goes on behind the BIOS.
const EXTENDED: u64 = 0x10_0000;

pub(super) struct Info<'a> {
    pub(super) layout: &'a Layout,
    pub(super) cmdline: &'a str,
    pub(super) initrd: Option<(u64, u64)>,
    /// Where the ACPI tables begin.
    pub(super) rsdp: u64,
}

/// A stretch of the memory map.
struct Range {
    base: u64,
    len: u64,
    usable: bool,
}

pub(super) fn cmdline(ram: &GuestRam, line: &str) -> Result<(), BootError> {
    ram.write_slice(line.as_bytes(), GuestAddress(CMDLINE))?;
    ram.write_obj(0u8, GuestAddress(CMDLINE + line.len() as u64))?;
    Ok(())
}

/// Writes what the kernel wants to be told and says how to enter it.
pub(super) fn tell(ram: &GuestRam, loaded: &Loaded, info: &Info<'_>) -> Result<Entry, BootError> {
    let mut entry = Entry {
        rip: loaded.entry,
        ..Entry::default()
    };
    match &loaded.setup {
        Setup::Multiboot => {
            multiboot(ram, info)?;
            entry.rax = 0x2bad_b002;
            entry.rbx = INFO;
        }
        Setup::Pvh => {
            pvh(ram, info)?;
            entry.rbx = INFO;
        }
        Setup::BzImage(header) => {
            let mut params = boot_params {
                hdr: **header,
                ..Default::default()
            };
            linux(&mut params, info);
            ram.write_obj(params, GuestAddress(INFO))?;
            entry.rsi = INFO;
        }
    }
    Ok(entry)
}

fn map(layout: &Layout) -> Vec<Range> {
    let range = |base, end: u64, usable| Range {
        base,
        len: end.saturating_sub(base),
        usable,
    };
    let mut all = vec![
        range(0, BASE_END, true),
        range(BASE_END, EXTENDED, false),
        range(EXTENDED, layout.low_end(), true),
        range(HOLE_START.max(layout.low_end()), HOLE_END, false),
    ];
    for piece in layout.pieces().iter().skip(1) {
        all.push(range(piece.base, piece.end(), true));
    }
    all
}

/// The addresses here are all below 4 GiB by construction.
fn low(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(u32::MAX)
}

fn multiboot(ram: &GuestRam, info: &Info<'_>) -> Result<(), BootError> {
    const MEMORY: u32 = 1 << 0;
    const LINE: u32 = 1 << 2;
    const MODS: u32 = 1 << 3;
    const MMAP: u32 = 1 << 6;

    let mut entries = Vec::new();
    for range in map(info.layout) {
        entries.extend_from_slice(&20u32.to_le_bytes());
        entries.extend_from_slice(&range.base.to_le_bytes());
        entries.extend_from_slice(&range.len.to_le_bytes());
        entries.extend_from_slice(&(if range.usable { 1u32 } else { 2 }).to_le_bytes());
    }
    ram.write_slice(&entries, GuestAddress(MAP))?;

    let mut words = [0u32; 22];
    words[0] = MEMORY | LINE | MMAP;
    words[1] = low(BASE_END / 1024);
    words[2] = low((info.layout.low_end() - EXTENDED) / 1024);
    words[4] = low(CMDLINE);
    if let Some((at, len)) = info.initrd {
        words[0] |= MODS;
        words[5] = 1;
        words[6] = low(MODULES);
        let module = [low(at), low(at + len), 0, 0];
        ram.write_slice(module.as_bytes(), GuestAddress(MODULES))?;
    }
    words[11] = u32::try_from(entries.len()).unwrap_or(0);
    words[12] = low(MAP);
    ram.write_slice(words.as_bytes(), GuestAddress(INFO))?;
    Ok(())
}

/// `hvm_start_info` version 1, its module list and its memory map (Xen's public header
/// arch-x86/hvm/start_info.h).
fn pvh(ram: &GuestRam, info: &Info<'_>) -> Result<(), BootError> {
    const MAGIC: u32 = 0x336e_c578;

    let mut table = Vec::new();
    let ranges = map(info.layout);
    for range in &ranges {
        table.extend_from_slice(&range.base.to_le_bytes());
        table.extend_from_slice(&range.len.to_le_bytes());
        let kind: u64 = if range.usable { 1 } else { 2 };
        table.extend_from_slice(&kind.to_le_bytes());
    }
    ram.write_slice(&table, GuestAddress(MAP))?;

    let modules = info.initrd.map_or(0, |_| 1u32);
    if let Some((at, len)) = info.initrd {
        ram.write_slice([at, len, 0, 0].as_bytes(), GuestAddress(MODULES))?;
    }
    let mut start = Vec::new();
    for word in [MAGIC, 1, 0, modules] {
        start.extend_from_slice(&word.to_le_bytes());
    }
    let list = info.initrd.map_or(0, |_| MODULES);
    // Modules, command line, RSDP, memory map.
    for address in [list, CMDLINE, info.rsdp, MAP, ranges.len() as u64] {
        start.extend_from_slice(&address.to_le_bytes());
    }
    ram.write_slice(&start, GuestAddress(INFO))?;
    Ok(())
}

fn linux(params: &mut boot_params, info: &Info<'_>) {
    params.acpi_rsdp_addr = info.rsdp;
    // Loader of no registered kind.
    params.hdr.type_of_loader = 0xff;
    params.hdr.cmd_line_ptr = low(CMDLINE);
    params.hdr.cmdline_size = u32::try_from(info.cmdline.len()).unwrap_or(0);
    if let Some((at, len)) = info.initrd {
        params.hdr.ramdisk_image = low(at);
        params.hdr.ramdisk_size = low(len);
    }
    let table = &mut params.e820_table;
    let mut count = 0;
    for (entry, range) in table.iter_mut().zip(map(info.layout)) {
        *entry = boot_e820_entry {
            addr: range.base,
            size: range.len,
            r#type: if range.usable { 1 } else { 2 },
        };
        count += 1;
    }
    params.e820_entries = count;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_covers_all_memory_and_no_hole() {
        let layout = Layout::new(5 << 30, 40).unwrap();
        let usable: u64 = map(&layout)
            .iter()
            .filter(|r| r.usable)
            .map(|r| r.len)
            .sum();
        assert_eq!(usable, (5 << 30) - (EXTENDED - BASE_END));
        for pair in map(&layout).windows(2) {
            assert!(pair[0].base + pair[0].len <= pair[1].base);
        }
    }

    #[test]
    fn a_multiboot_guest_finds_line_module_and_map() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        let layout = Layout::new(4 << 20, 40).unwrap();
        let info = Info {
            layout: &layout,
            cmdline: "a=1",
            initrd: Some((0x30_0000, 5)),
            rsdp: 0xe_0000,
        };
        cmdline(&ram, info.cmdline).unwrap();
        multiboot(&ram, &info).unwrap();
        let word = |n: u64| ram.read_obj::<u32>(GuestAddress(INFO + 4 * n)).unwrap();
        assert_eq!(word(0), 0b100_1101);
        assert_eq!(word(2), 3072);
        let mut line = [0; 4];
        ram.read_slice(&mut line, GuestAddress(word(4).into()))
            .unwrap();
        assert_eq!(&line, b"a=1\0");
        let module: u32 = ram.read_obj(GuestAddress(word(6).into())).unwrap();
        assert_eq!(module, 0x30_0000);
        assert_eq!(word(11), 4 * 24);
    }
}
