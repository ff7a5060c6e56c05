//! Which kind of image, and its pieces into memory.

use std::io::Cursor;

use linux_loader::bootparam::setup_header;
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, KernelKind};
use crate::memory::{GuestRam, Layout, PAGE_SIZE};

/// Kernels are loaded from here on.
const HIGH_MEMORY: u64 = 1 << 20;

/// A kernel in memory.
pub(super) struct Loaded {
    pub(super) entry: u64,
    /// First address behind it.
    pub(super) end: u64,
    pub(super) setup: Setup,
}

pub(super) enum Setup {
    Multiboot,
    Pvh,
    BzImage(Box<setup_header>),
}

impl Loaded {
    pub(super) fn kind(&self) -> KernelKind {
        match self.setup {
            Setup::Multiboot => KernelKind::Multiboot,
            Setup::Pvh => KernelKind::Pvh,
            Setup::BzImage(_) => KernelKind::BzImage,
        }
    }

    /// Longest command line that the kernel takes, without its end mark.
    pub(super) fn most_cmdline(&self) -> usize {
        const OURS: usize = super::MOST_CMDLINE - 1;
        match &self.setup {
            // Before protocol 2.06 there was no field, and 255 were the most.
            Setup::BzImage(header) if header.version < 0x0206 => 255,
            Setup::BzImage(header) => OURS.min(header.cmdline_size as usize),
            Setup::Multiboot | Setup::Pvh => OURS,
        }
    }

    /// First address behind the memory that the initial ramdisk may lie in.
    fn ramdisk_end(&self, layout: &Layout) -> u64 {
        let most = match &self.setup {
            // Before protocol 2.03 the field was not there.
            Setup::BzImage(header) if header.version < 0x0203 => 0x37ff_ffff,
            Setup::BzImage(header) => u64::from(header.initrd_addr_max),
            Setup::Multiboot | Setup::Pvh => u64::from(u32::MAX),
        };
        layout.low_end().min(most.saturating_add(1))
    }
}

/// What can be said of an image without loading it.
pub(super) fn identify(image: &[u8]) -> Result<(), BootError> {
    let elf = image.starts_with(b"\x7fELF");
    let bzimage = image.get(0x202..0x206) == Some(b"HdrS");
    if Multiboot::find(image)?.is_some() || elf || bzimage {
        return Ok(());
    }
    Err(BootError::UnknownKind {
        magic: image.get(..8).unwrap_or(image).into(),
    })
}

pub(super) fn load(ram: &GuestRam, layout: &Layout, image: &[u8]) -> Result<Loaded, BootError> {
    if let Some(header) = Multiboot::find(image)? {
        return header.load(ram, layout, image);
    }
    if image.starts_with(b"\x7fELF") {
        return load_pvh(ram, layout, image);
    }
    if image.get(0x202..0x206) == Some(b"HdrS") {
        return load_bzimage(ram, layout, image);
    }
    identify(image)?;
    Err(damaged("neither entry nor header"))
}

fn damaged(what: impl ToString) -> BootError {
    BootError::Damaged {
        what: what.to_string(),
    }
}

/// Says that the kernel does not fit before anything of it is written.
fn fits(layout: &Layout, start: u64, len: u64) -> Result<(), BootError> {
    let end = start.saturating_add(len);
    if end <= layout.low_end() {
        return Ok(());
    }
    Err(BootError::NoRoom {
        what: "the kernel",
        start,
        end,
    })
}

fn load_pvh(ram: &GuestRam, layout: &Layout, image: &[u8]) -> Result<Loaded, BootError> {
    // e_machine; the class byte tells 32-bit images, which linux-loader does not read.
    let machine = match (image.get(4), image.get(18..20)) {
        (Some(2), Some([0x3e, 0])) => None,
        (Some(1), _) => Some("a 32-bit processor"),
        _ => Some("another processor"),
    };
    if let Some(machine) = machine {
        return Err(BootError::NoEntry { machine });
    }
    let pieces = elf(image)?.1;
    let mut end = HIGH_MEMORY;
    for piece in &pieces {
        fits(layout, piece.to, piece.memory)?;
        end = end.max(piece.to + piece.memory);
    }
    // linux-loader writes what the file has: it clears no rest, and does not count a segment of
    // nothing else. Cleared first, so that no rest lies over another segment's bytes.
    for piece in &pieces {
        let rest = piece.to + piece.bytes.len() as u64;
        zero(ram, rest, piece.to + piece.memory)?;
    }
    let KernelLoaderResult { pvh_boot_cap, .. } =
        Elf::load(ram, None, &mut Cursor::new(image), None).map_err(damaged)?;
    let PvhBootCapability::PvhEntryPresent(entry) = pvh_boot_cap else {
        return Err(BootError::NoEntry { machine: "x86-64" });
    };
    Ok(Loaded {
        entry: entry.0,
        end,
        setup: Setup::Pvh,
    })
}

fn load_bzimage(ram: &GuestRam, layout: &Layout, image: &[u8]) -> Result<Loaded, BootError> {
    // The boot sector and the setup sectors (0 means 4) stay behind.
    let sectors = image.get(0x1f1).map_or(0, |n| u64::from(*n));
    let setup = (if sectors == 0 { 4 } else { sectors } + 1) * 512;
    fits(
        layout,
        HIGH_MEMORY,
        (image.len() as u64).saturating_sub(setup),
    )?;
    let result = BzImage::load(
        ram,
        None,
        &mut Cursor::new(image),
        Some(GuestAddress(HIGH_MEMORY)),
    )
    .map_err(damaged)?;
    let header = result
        .setup_header
        .ok_or_else(|| damaged("no setup header"))?;
    // What the kernel unpacks itself into.
    let needs = u64::from(header.init_size).max(result.kernel_end - result.kernel_load.0);
    let begin = result.kernel_load.0.max(header.pref_address);
    fits(layout, begin, needs)?;
    Ok(Loaded {
        entry: result.kernel_load.0,
        end: begin.saturating_add(needs),
        setup: Setup::BzImage(Box::new(header)),
    })
}

/// Puts the initial ramdisk as high as low memory and the kernel allow. Returns address and length.
pub(super) fn initrd(
    ram: &GuestRam,
    layout: &Layout,
    bytes: &[u8],
    kernel: &Loaded,
) -> Result<(u64, u64), BootError> {
    let len = bytes.len() as u64;
    let end = kernel.ramdisk_end(layout);
    let at = end.saturating_sub(len) & !(PAGE_SIZE as u64 - 1);
    if at < kernel.end || len > end {
        return Err(BootError::NoRoomForRamdisk {
            len,
            start: kernel.end,
            end,
        });
    }
    ram.write_slice(bytes, GuestAddress(at))?;
    Ok((at, len))
}

/// A multiboot 1 header.
struct Multiboot {
    at: usize,
    flags: u32,
}

/// A piece of an image and where it goes.
struct Piece<'a> {
    bytes: &'a [u8],
    to: u64,
    memory: u64,
}

impl Multiboot {
    const MAGIC: u32 = 0x1bad_b002;
    /// The header lies within this many bytes.
    const SEARCH: usize = 8192;
    /// The image says itself where it is loaded.
    const ADDRESSES: u32 = 1 << 16;
    /// Required features that we offer: page-aligned modules, memory information.
    const OFFERED: u32 = 0b11;

    fn find(image: &[u8]) -> Result<Option<Self>, BootError> {
        let end = image.len().min(Self::SEARCH);
        for at in (0..end).step_by(4) {
            let (Ok(magic), Ok(flags), Ok(sum)) =
                (word(image, at), word(image, at + 4), word(image, at + 8))
            else {
                return Ok(None);
            };
            if magic == Self::MAGIC && magic.wrapping_add(flags).wrapping_add(sum) == 0 {
                // The low half are requirements; what we do not know there we must refuse.
                if flags & 0xffff & !Self::OFFERED != 0 {
                    return Err(BootError::MultibootFlags { flags });
                }
                return Ok(Some(Self { at, flags }));
            }
        }
        Ok(None)
    }

    fn load(&self, ram: &GuestRam, layout: &Layout, image: &[u8]) -> Result<Loaded, BootError> {
        let (entry, pieces) = if self.flags & Self::ADDRESSES != 0 {
            self.flat(image)?
        } else if image.starts_with(b"\x7fELF") {
            elf(image)?
        } else {
            return Err(damaged("multiboot without addresses, and not an ELF image"));
        };
        let mut end = HIGH_MEMORY;
        for piece in &pieces {
            let no_room = || BootError::NoRoom {
                what: "the kernel",
                start: piece.to,
                end: piece.to.saturating_add(piece.memory),
            };
            let piece_end = piece.to.checked_add(piece.memory).ok_or_else(no_room)?;
            fits(layout, piece.to, piece.memory)?;
            ram.write_slice(piece.bytes, GuestAddress(piece.to))?;
            zero(ram, piece.to + piece.bytes.len() as u64, piece_end)?;
            end = end.max(piece_end);
        }
        Ok(Loaded {
            entry,
            end,
            setup: Setup::Multiboot,
        })
    }

    fn flat<'a>(&self, image: &'a [u8]) -> Result<(u64, Vec<Piece<'a>>), BootError> {
        let field = |n: usize| word(image, self.at + 12 + 4 * n);
        let (header, load, load_end, bss_end, entry) =
            (field(0)?, field(1)?, field(2)?, field(3)?, field(4)?);
        let begin = header
            .checked_sub(load)
            .and_then(|before| self.at.checked_sub(before as usize))
            .ok_or_else(|| damaged("the header lies before the load address"))?;
        let bytes = if load_end == 0 {
            image.get(begin..)
        } else {
            load_end
                .checked_sub(load)
                .and_then(|len| image.get(begin..begin.checked_add(len as usize)?))
        }
        .ok_or_else(|| damaged("the image ends before its load end"))?;
        let loaded = bytes.len() as u64;
        let memory = u64::from(bss_end).saturating_sub(load.into()).max(loaded);
        let piece = Piece {
            bytes,
            to: load.into(),
            memory,
        };
        Ok((entry.into(), vec![piece]))
    }
}

/// The loadable pieces of a 32- or 64-bit ELF image, by physical address.
fn elf(image: &[u8]) -> Result<(u64, Vec<Piece<'_>>), BootError> {
    /// Most program headers looked at.
    const MOST: usize = 64;
    const LOAD: u32 = 1;

    let wide = match image.get(4) {
        Some(1) => false,
        Some(2) => true,
        _ => return Err(damaged("ELF class")),
    };
    let number = |at: usize| {
        if wide {
            long(image, at)
        } else {
            word(image, at).map(u64::from)
        }
    };
    let (entry, table, sizes) = if wide {
        (number(24)?, number(32)?, 54)
    } else {
        (number(24)?, number(28)?, 42)
    };
    let size = usize::from(half(image, sizes)?);
    let count = usize::from(half(image, sizes + 2)?);
    if count > MOST {
        return Err(damaged(format!("{count} program headers, at most {MOST}")));
    }
    let table = usize::try_from(table).map_err(damaged)?;
    let mut pieces = Vec::new();
    for n in 0..count {
        let at = size
            .checked_mul(n)
            .and_then(|o| o.checked_add(table))
            .ok_or_else(|| damaged("program header table"))?;
        if word(image, at)? != LOAD {
            continue;
        }
        // p_offset, p_paddr, p_filesz, p_memsz
        let [offset, to, len, memory] = if wide {
            [at + 8, at + 24, at + 32, at + 40]
        } else {
            [at + 4, at + 12, at + 16, at + 20]
        };
        let offset = usize::try_from(number(offset)?).map_err(damaged)?;
        let len = usize::try_from(number(len)?).map_err(damaged)?;
        let bytes = offset
            .checked_add(len)
            .and_then(|end| image.get(offset..end))
            .ok_or_else(|| damaged("a segment runs past the end of the file"))?;
        let memory = number(memory)?;
        if memory < bytes.len() as u64 {
            return Err(damaged("a segment is larger in the file than in memory"));
        }
        pieces.push(Piece {
            bytes,
            to: number(to)?,
            memory,
        });
    }
    Ok((entry, pieces))
}

fn zero(ram: &GuestRam, mut at: u64, end: u64) -> Result<(), BootError> {
    let page = [0; PAGE_SIZE];
    while at < end {
        let len = usize::try_from(end - at).map_or(PAGE_SIZE, |n| n.min(PAGE_SIZE));
        ram.write_slice(page.get(..len).unwrap_or(&page), GuestAddress(at))?;
        at += len as u64;
    }
    Ok(())
}

fn bytes<const N: usize>(image: &[u8], at: usize) -> Result<[u8; N], BootError> {
    at.checked_add(N)
        .and_then(|end| image.get(at..end))
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| damaged(format!("it ends before byte {:#x}", at.saturating_add(N))))
}

fn half(image: &[u8], at: usize) -> Result<u16, BootError> {
    bytes(image, at).map(u16::from_le_bytes)
}

fn word(image: &[u8], at: usize) -> Result<u32, BootError> {
    bytes(image, at).map(u32::from_le_bytes)
}

fn long(image: &[u8], at: usize) -> Result<u64, BootError> {
    bytes(image, at).map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ram() -> (GuestRam, Layout) {
        let layout = Layout::new(4 << 20, 40).unwrap();
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        (ram, layout)
    }

    fn words(all: &[u32]) -> Vec<u8> {
        all.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    /// A flat image: header, then one word of code.
    fn flat() -> Vec<u8> {
        let magic = Multiboot::MAGIC;
        let flags = Multiboot::ADDRESSES;
        let sum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
        words(&[
            magic,
            flags,
            sum,
            0x10_0000,
            0x10_0000,
            0x10_0024,
            0x10_1000,
            0x10_0020,
            0xf4f4_f4f4,
        ])
    }

    fn error(image: &[u8]) -> String {
        let (ram, layout) = ram();
        load(&ram, &layout, image).err().unwrap().to_string()
    }

    #[test]
    fn a_flat_multiboot_image_says_where_it_goes() {
        let (ram, layout) = ram();
        ram.write_slice(&[1; 64], GuestAddress(0x10_0000)).unwrap();
        let loaded = load(&ram, &layout, &flat()).unwrap();
        assert_eq!(loaded.kind(), KernelKind::Multiboot);
        assert_eq!((loaded.entry, loaded.end), (0x10_0020, 0x10_1000));
        let code: u32 = ram.read_obj(GuestAddress(0x10_0020)).unwrap();
        assert_eq!(code, 0xf4f4_f4f4);
        let bss: u32 = ram.read_obj(GuestAddress(0x10_0024)).unwrap();
        assert_eq!(bss, 0, "memory behind the file is cleared");
    }

    #[test]
    fn wrong_kinds_are_named() {
        assert!(error(b"#!/bin/sh\n").contains("of no kind known here: it begins with [23, 21"));
        assert!(error(b"").contains("of no kind"));
        let mut arm = vec![0; 64];
        arm[..5].copy_from_slice(b"\x7fELF\x02");
        arm[18] = 183;
        assert!(error(&arm).contains("ELF image for another processor"));
        let mut flags = flat();
        flags[4] = 4;
        flags[8..12].copy_from_slice(
            &0u32
                .wrapping_sub(Multiboot::MAGIC)
                .wrapping_sub(Multiboot::ADDRESSES | 4)
                .to_le_bytes(),
        );
        assert!(error(&flags).contains("requires features 0x10004"));
    }

    #[test]
    fn a_kernel_larger_than_memory_is_refused() {
        let mut image = flat();
        image[24..28].copy_from_slice(&0x4000_0000u32.to_le_bytes());
        assert!(error(&image).ends_with("give the guest more memory"));
    }

    #[test]
    fn a_cut_image_is_refused() {
        let image = flat();
        assert!(error(&image[..32]).contains("cut"));
    }

    /// A 64-bit ELF image with a PVH entry at 1 MiB and these segments: address, bytes, memory.
    fn pvh(segments: &[(u64, &[u8], u64)]) -> Vec<u8> {
        let note = words(&[4, 4, 18, u32::from_le_bytes(*b"Xen\0"), 0x10_0000]);
        let mut elf = vec![0; 64];
        elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        elf[16] = 2;
        elf[18] = 0x3e;
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = 1 + u8::try_from(segments.len()).unwrap();
        let mut data: Vec<u8> = vec![];
        let begin = 64 + 56 * u64::from(elf[56]);
        let size = note.len() as u64;
        let all = [(4u64, 0, note.as_slice(), size)].into_iter();
        for (kind, to, bytes, memory) in all.chain(segments.iter().map(|s| (1, s.0, s.1, s.2))) {
            let (offset, file) = (begin + data.len() as u64, bytes.len() as u64);
            for field in [kind, offset, 0, to, file, memory, 0] {
                elf.extend(field.to_le_bytes());
            }
            data.extend(bytes);
        }
        elf.extend(data);
        elf
    }

    #[test]
    fn the_memory_of_a_pvh_kernel_behind_its_bytes_is_cleared() {
        let (ram, layout) = ram();
        ram.write_slice(&[1; 0x3000], GuestAddress(0x10_0000))
            .unwrap();
        // The rest of the first one reaches over the second one.
        let image = pvh(&[
            (0x10_0000, &[7; 4], 0x2000),
            (0x10_1000, &[8; 4], 4),
            (0x10_2000, &[], 0x800),
        ]);
        let loaded = load(&ram, &layout, &image).unwrap();
        assert_eq!(loaded.kind(), KernelKind::Pvh);
        assert_eq!((loaded.entry, loaded.end), (0x10_0000, 0x10_2800));
        let mut memory = [9; 0x2801];
        ram.read_slice(&mut memory, GuestAddress(0x10_0000))
            .unwrap();
        let mut expected = [0; 0x2801];
        expected[..4].fill(7);
        expected[0x1000..0x1004].fill(8);
        expected[0x2800] = 1;
        assert!(memory == expected);
    }

    #[test]
    fn the_ramdisk_does_not_lie_in_a_segment_without_bytes() {
        let (ram, layout) = ram();
        let bss = (4 << 20) - 4096 - 0x20_0000;
        let image = pvh(&[(0x10_0000, &[0xf4; 4], 4), (0x20_0000, &[], bss)]);
        let loaded = load(&ram, &layout, &image).unwrap();
        assert_eq!(loaded.end, (4 << 20) - 4096);
        initrd(&ram, &layout, &[7; 5000], &loaded).unwrap_err();
        let (at, len) = initrd(&ram, &layout, &[7; 4096], &loaded).unwrap();
        assert_eq!((at, len), (loaded.end, 4096));
    }

    fn kernel(setup: Setup, end: u64) -> Loaded {
        Loaded {
            entry: 0,
            end,
            setup,
        }
    }

    #[test]
    fn the_ramdisk_goes_to_the_top_and_not_over_the_kernel() {
        let (ram, layout) = ram();
        let place = |end| initrd(&ram, &layout, &[7; 5000], &kernel(Setup::Pvh, end));
        assert_eq!(place(0x20_0000).unwrap(), ((4 << 20) - 8192, 5000));
        assert!(place((4 << 20) - 4096).is_err());
    }

    /// Code for a bzImage: nothing that could run.
    fn bzimage(change: impl FnOnce(&mut setup_header), code: usize) -> Vec<u8> {
        let mut header = setup_header {
            setup_sects: 1,
            boot_flag: 0xaa55,
            header: 0x5372_6448,
            version: 0x020f,
            loadflags: 1,
            code32_start: 0x10_0000,
            cmdline_size: 2047,
            initrd_addr_max: 0x7fff_ffff,
            init_size: 0x1_0000,
            pref_address: 0x10_0000,
            ..setup_header::default()
        };
        change(&mut header);
        let page = linux_loader::bootparam::boot_params {
            hdr: header,
            ..Default::default()
        };
        // The header lies in a boot sector where it lies in the boot parameters.
        let mut image = vm_memory::ByteValued::as_slice(&page)[..1024].to_vec();
        image.resize(1024 + code, 0xf4);
        image
    }

    #[test]
    fn a_bzimage_says_how_high_its_ramdisk_may_lie() {
        let (ram, layout) = ram();
        let image = bzimage(|h| h.initrd_addr_max = 0x2f_ffff, 4096);
        let loaded = load(&ram, &layout, &image).unwrap();
        assert_eq!(loaded.kind(), KernelKind::BzImage);
        let (at, len) = initrd(&ram, &layout, &[7; 5000], &loaded).unwrap();
        assert_eq!((at, len), (0x30_0000 - 8192, 5000));
        let far = vec![7; 0x20_0000];
        let error = initrd(&ram, &layout, &far, &loaded).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the initial ramdisk has 2097152 bytes, and the kernel takes it between 0x110000 and \
             0x300000 only; give the guest more memory or a smaller ramdisk"
        );
    }

    #[test]
    fn a_bzimage_says_how_long_its_command_line_may_be() {
        let (ram, layout) = ram();
        let most = |image: &[u8]| load(&ram, &layout, image).unwrap().most_cmdline();
        assert_eq!(most(&bzimage(|h| h.cmdline_size = 100, 4096)), 100);
        assert_eq!(most(&bzimage(|h| h.cmdline_size = 1 << 20, 4096)), 2047);
        assert_eq!(most(&bzimage(|h| h.version = 0x0205, 4096)), 255);
    }

    #[test]
    fn a_kernel_that_does_not_fit_is_told_from_a_damaged_one() {
        let needs = "give the guest more memory";
        let unpacked = error(&bzimage(|h| h.init_size = 64 << 20, 4096));
        assert!(unpacked.ends_with(needs), "{unpacked}");
        let packed = error(&bzimage(|_| {}, 4 << 20));
        assert!(packed.ends_with(needs), "{packed}");
        // An ELF whose one segment lies at 16 MiB.
        let mut elf = vec![0; 64 + 56];
        elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        elf[16] = 2;
        elf[18] = 0x3e;
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = 1;
        elf[64] = 1;
        elf[64 + 24 + 3] = 1;
        elf[64 + 40] = 8;
        let high = error(&elf);
        assert_eq!(
            high,
            "the kernel needs 0x1000000..0x1000008, outside of guest memory; give the guest more \
             memory"
        );
        let cut = error(&bzimage(|_| {}, 4096)[..0x210]);
        assert!(cut.contains("damaged or cut"), "{cut}");
    }

    proptest! {
        #[test]
        fn any_image_is_loaded_or_refused(
            mut image in proptest::collection::vec(any::<u8>(), 0..600),
            kind in 0..3,
        ) {
            let (ram, layout) = ram();
            let head: &[u8] = match kind {
                0 => &flat()[..12],
                1 => b"\x7fELF\x02\x01\x01",
                _ => b"\x7fELF\x01\x01\x01",
            };
            let len = head.len().min(image.len());
            image[..len].copy_from_slice(&head[..len]);
            let _either = load(&ram, &layout, &image);
            let _either = elf(&image);
        }
    }
}
