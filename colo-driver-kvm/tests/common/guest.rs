//! A guest that checks its own memory, assembled into this binary and booted by multiboot.
//!
//! Each vCPU walks over a working set of its own. The `s`th visit of all writes `s` to both ends of
//! page `s mod ws` and first checks that both hold `s - ws`, what the visit before last left there.
//! `s` lives in a register. So a checkpoint that mixes memory and registers of two instants, or
//! misses or tears a page, is found by the guest itself within one turn. It names the page by its offset in the GiB
//! that the working sets are in, plus 4 GiB: there they are mapped.
//!
//! Ring 0 sets up long mode and starts the other vCPUs; the walk runs in ring 3.

use std::arch::global_asm;

global_asm!(
    r#"
    .section .rodata.colo_test_guest, "a"
    .balign 16
    .set LOAD, 0x100000
    .globl colo_test_guest, colo_test_guest_end
colo_test_guest:
    .long 0x1BADB002, 0x10000, -(0x1BADB002 + 0x10000)
    .long LOAD, LOAD, 0, 0, entry - colo_test_guest + LOAD
    # Parameters, patched by the host before boot; 32 bytes into the image.
pages:  .quad 0
ws:     .quad 0
period: .quad 0
cpus:   .quad 0
base:   .quad 0
next:   .long 0

    .code32
entry:
    cli
    mov $0x90000, %esp
    mov $0x80000, %edi
    xor %eax, %eax
    mov $(6 * 1024), %ecx
    rep stosl
    movl $0x81007, 0x80000
    movl $0x82007, 0x81000
    movl $0x83007, 0x81008
    movl $0x84007, 0x81010
    movl $0x85007, 0x81018
    movl $0x86007, 0x81020
    mov $0x82000, %edi
    mov $0x87, %eax
    mov $2048, %ecx
1:  mov %eax, (%edi)
    add $8, %edi
    add $0x200000, %eax
    loop 1b
    # The gigabyte that the working sets are in, once more, behind the first four.
    mov base - colo_test_guest + LOAD, %eax
    and $0xC0000000, %eax
    or $0x87, %eax
    mov $512, %ecx
1:  mov %eax, (%edi)
    mov base + 4 - colo_test_guest + LOAD, %edx
    mov %edx, 4(%edi)
    add $8, %edi
    add $0x200000, %eax
    loop 1b
    cmpl $1, cpus - colo_test_guest + LOAD
    jbe common
    mov $(trampoline - colo_test_guest + LOAD), %esi
    mov $0x8000, %edi
    mov $(trampoline_end - trampoline), %ecx
    rep movsb
    movl $0x1ff, 0xfee000f0
    movl $0x000c4500, 0xfee00300
    movl $0x000c4608, 0xfee00300
common:
    mov $1, %ebp
    lock xadd %ebp, next - colo_test_guest + LOAD
    mov $0x80000, %eax
    mov %eax, %cr3
    mov %cr4, %eax
    or $0x620, %eax
    mov %eax, %cr4
    mov $0xC0000080, %ecx
    rdmsr
    or $0x100, %eax
    wrmsr
    lgdt gdtr - colo_test_guest + LOAD
    mov %cr0, %eax
    or $0x80000001, %eax
    and $~6, %eax
    mov %eax, %cr0
    ljmp $8, $(long_mode - colo_test_guest + LOAD)

    .code64
long_mode:
    mov $16, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov %ebp, %r15d
    cmpq $0, pages - colo_test_guest + LOAD
    jne 2f
    movq $1, 0x1000
1:  hlt
    jmp 1b
2:  mov $0x90000, %esp
    pushq $0x23
    pushq $0x70000
    pushq $0x3002
    pushq $0x1b
    pushq $(user - colo_test_guest + LOAD)
    iretq
user:
    mov $0x23, %ax
    mov %ax, %ds
    mov %ax, %es
    mov ws - colo_test_guest + LOAD, %r13
    mov pages - colo_test_guest + LOAD, %r14
    mov %r15, %rax
    imul %r13, %rax
    shl $12, %rax
    mov base - colo_test_guest + LOAD, %rdx
    and $0x3FFFFFFF, %rdx
    add %rdx, %rax
    mov $0x100000000, %rbx
    add %rax, %rbx
    mov %r15, %r9
    shl $6, %r9
    add $0x1000, %r9
    mov $1, %r12
    xor %r8, %r8
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    mov %rax, %r10
tick:
    mov %r14, %rcx
1:  mov %r8, %rax
    shl $12, %rax
    add %rbx, %rax
    xor %esi, %esi
    mov %r12, %rdx
    sub %r13, %rdx
    cmovbe %rsi, %rdx
    cmp %rdx, (%rax)
    jne bad
    cmp %rdx, 4088(%rax)
    jne bad
2:  mov %r12, (%rax)
    mov %r12, 4088(%rax)
    inc %r12
    inc %r8
    cmp %r13, %r8
    jb 3f
    xor %r8, %r8
3:  dec %rcx
    jnz 1b
    mov %r12, (%r9)
    incq 8(%r9)
    cmpq $0, period - colo_test_guest + LOAD
    je tick
    add period - colo_test_guest + LOAD, %r10
4:  pause
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    cmp %r10, %rax
    jb 4b
    jmp tick
bad:
    incq 16(%r9)
    mov %rax, 24(%r9)
    mov %rdx, 32(%r9)
    jmp 2b

    .code16
trampoline:
    cli
    xor %ax, %ax
    mov %ax, %ds
    lgdtl 0x8000 + (gdtr16 - trampoline)
    mov %cr0, %eax
    or $1, %eax
    mov %eax, %cr0
    ljmpl $0x28, $(0x8000 + trampoline32 - trampoline)
    .code32
trampoline32:
    mov $0x30, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov $(common - colo_test_guest + LOAD), %eax
    jmp *%eax
    .balign 8
gdtr16:
    .word 0x37
    .long gdt - colo_test_guest + LOAD
trampoline_end:
    .balign 8
gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00affb000000ffff, 0x00cff3000000ffff
    .quad 0x00cf9b000000ffff, 0x00cf93000000ffff
gdtr:
    .word 0x37
    .long gdt - colo_test_guest + LOAD
colo_test_guest_end:
    .code64
    .text
"#,
    options(att_syntax)
);

unsafe extern "C" {
    static colo_test_guest: u8;
    static colo_test_guest_end: u8;
}

/// What the guest does.
#[derive(Debug, Clone, Copy)]
pub struct Walk {
    /// Pages visited a tick; 0 halts at once.
    pub pages: u64,
    /// Working set of each vCPU in pages.
    pub ws: u64,
    /// TSC ticks between ticks; 0 does not wait.
    pub period: u64,
    /// vCPUs that walk.
    pub cpus: u64,
    /// Guest-physical address of the first working set; none may cross a GiB.
    pub base: u64,
}

impl Default for Walk {
    fn default() -> Self {
        Self {
            pages: 16,
            ws: 512,
            period: 0,
            cpus: 1,
            base: 4 << 20,
        }
    }
}

/// The image with these parameters in it.
pub fn image(walk: Walk) -> Vec<u8> {
    let start = &raw const colo_test_guest;
    let end = &raw const colo_test_guest_end;
    let len = end as usize - start as usize;
    // SAFETY: the two symbols bound the read-only bytes assembled above.
    let mut image = unsafe { std::slice::from_raw_parts(start, len) }.to_vec();
    let words = [walk.pages, walk.ws, walk.period, walk.cpus, walk.base];
    for (n, word) in words.into_iter().enumerate() {
        image[32 + 8 * n..40 + 8 * n].copy_from_slice(&word.to_le_bytes());
    }
    image
}
