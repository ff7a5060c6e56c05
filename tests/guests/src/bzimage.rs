//! A guest as a Linux bzImage (the kernel's `Documentation/arch/x86/boot.rst`).

use std::arch::global_asm;

// What a loader that starts in real mode enters: to 32 bits, and to the first byte at 1 MiB. It
// lies right behind the header, at `CODE`; `ds` is the segment of the file's first byte.
global_asm!(
    r#"
    .section .rodata.colo_bzimage, "a"
    .globl colo_bzimage, colo_bzimage_end
colo_bzimage:
    .set CODE, 0x268
    .code16
    cli
    xorl %eax, %eax
    movw %ds, %ax
    shll $4, %eax
    movl %eax, %esi                     # the boot parameters begin like the file
    leal bzimage_gdt - colo_bzimage + CODE(%eax), %ebx
    movl %ebx, bzimage_gdtr - colo_bzimage + CODE + 2
    lgdtl bzimage_gdtr - colo_bzimage + CODE
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    ljmpl $0x10, $0x100000
bzimage_gdtr:
    .word 4 * 8 - 1
    .long 0
bzimage_gdt:
    .quad 0, 0
    .quad 0x00CF9B000000FFFF            # 0x10 code
    .quad 0x00CF93000000FFFF            # 0x18 data
colo_bzimage_end:
    .code64
    .text
    "#,
    options(att_syntax)
);

unsafe extern "C" {
    static colo_bzimage: u8;
    static colo_bzimage_end: u8;
}

/// Where the real-mode code lies in the file.
const CODE: usize = 0x268;
/// Boot sector and one more.
const SETUP: usize = 2 * 512;

/// `elf`, one of the guests here, as a bzImage of boot protocol 2.10.
///
/// # Panics
///
/// If it is none of the guests: their one loadable segment begins at 1 MiB with the entry point.
#[must_use]
pub fn bzimage(elf: &[u8]) -> Vec<u8> {
    // The values are small: the low half of each field is all of it.
    let field = |at: usize| u32::from_le_bytes([elf[at], elf[at + 1], elf[at + 2], elf[at + 3]]);
    let segment = field(32) as usize;
    let [offset, address, length, memory] = [8, 24, 32, 40].map(|at| field(segment + at));
    assert_eq!(address, 0x10_0000, "the guest begins at 1 MiB");
    let payload = &elf[offset as usize..(offset + length) as usize];

    let mut image = vec![0; SETUP];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1F1, &[1]); // setup sectors behind the boot sector
    put(0x1F4, &length.div_ceil(16).to_le_bytes());
    put(0x1FE, &[0x55, 0xAA]);
    put(0x200, &[0xEB, (CODE - 0x202) as u8]); // jump over the header
    put(0x202, b"HdrS");
    put(0x206, &0x020A_u16.to_le_bytes());
    put(0x211, &[1]); // loaded high
    put(0x214, &0x10_0000_u32.to_le_bytes());
    put(0x22C, &0x7FFF_FFFF_u32.to_le_bytes()); // highest byte of the ramdisk
    put(0x230, &0x1000_u32.to_le_bytes()); // alignment
    put(0x238, &2047_u32.to_le_bytes()); // command line
    put(0x258, &0x10_0000_u64.to_le_bytes()); // preferred address
    put(0x260, &memory.to_le_bytes());
    let (start, end) = (&raw const colo_bzimage, &raw const colo_bzimage_end);
    // SAFETY: the two symbols bound the read-only bytes assembled above.
    put(CODE, unsafe {
        std::slice::from_raw_parts(start, end as usize - start as usize)
    });
    image.extend(without_multiboot(payload));
    image
}

/// `image` without its multiboot header: a loader finds another way in.
#[must_use]
pub fn without_multiboot(image: &[u8]) -> Vec<u8> {
    let mut image = image.to_vec();
    let magic = 0x1BAD_B002_u32.to_le_bytes();
    if let Some(at) = image.windows(4).position(|window| window == magic) {
        image[at..at + 4].fill(0);
    }
    image
}
