# From the loader to ring 3, and the few handlers that run in ring 0.
#
# Ring 0 does only what ring 3 cannot: page tables (assembled, not computed), GDT, TSS, `iretq`.
# Everything else, filling the IDT included, happens in ring 3 with I/O privilege level 3 and, since
# some hosts lose that level, a TSS that opens every port. Nothing in ring 3 needs `cli` or `sti`.

.section .boot, "ax"
.code32
# bzImage: entered at the first byte, esi = boot parameters, and from real mode with its segments.
bzimage_start:
    cli
    cld
    mov $0x18, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $0x53726448, %eax               # HdrS
    mov %esi, %ebx
    jmp _start
.balign 8
multiboot_header:
    .long 0x1BADB002
    .long 0x00010002                    # address fields are valid; memory size wanted
    .long -(0x1BADB002 + 0x00010002)
    .long multiboot_header
    .long __load_start
    .long __load_end
    .long __bss_end
    .long _start

# Multiboot: eax = 0x2BADB002, ebx = info. PVH: ebx = start info. bzImage: eax = HdrS, ebx = boot
# parameters. All: 32 bits, paging off.
.globl _start
_start:
    cli
    cld
    mov %eax, %edi
    mov %ebx, %esi
    mov $pml4, %eax
    mov %eax, %cr3
    mov %cr4, %eax
    or $0x620, %eax                     # PAE, OSFXSR, OSXMMEXCPT
    mov %eax, %cr4
    mov $0xC0000080, %ecx               # EFER
    rdmsr
    or $0x100, %eax                     # LME
    wrmsr
    mov $tss, %eax                      # the TSS descriptor scatters its base over three fields
    mov %ax, gdt_tss + 2
    shr $16, %eax
    mov %al, gdt_tss + 4
    mov %ah, gdt_tss + 7
    lgdt gdtr
    mov %cr0, %eax
    and $~0x0C, %eax                    # EM and TS off: SSE is used from the start
    or $0x80000023, %eax                # PG, NE, MP, PE
    mov %eax, %cr0
    ljmp $0x08, $long_mode

.code64
long_mode:
    mov $0x10, %eax
    mov %eax, %ss
    mov $0x23, %eax
    mov %eax, %ds
    mov %eax, %es
    xor %eax, %eax
    mov %eax, %fs
    mov %eax, %gs
    mov $ring0_stack_top, %esp
    lidt idtr
    mov $0x28, %eax
    ltr %ax
    pushq $0x23
    pushq $ring3_stack_top
    pushq $0x3002                       # IOPL 3, interrupts off
    pushq $0x1B
    pushq $ring3
    iretq

.section .text.boot, "ax"
ring3:
    mov %edi, %r12d
    mov %esi, %r13d
    mov $__bss_start, %edi
    mov $__bss_end, %ecx
    sub %edi, %ecx
    xor %eax, %eax
    rep stosb
    mov %r12d, %edi
    mov %r13d, %esi
    xor %ebp, %ebp
    call guest_start
    ud2

# --- interrupts: as short as can be, ring 0 may be interpreted -----------------------------------

.macro end_of_interrupt
    push %rax
    mov $0xFEE000B0, %eax
    movl $0, (%rax)
    pop %rax
.endm

.globl on_wake
on_wake:                                # timer and devices: somebody should look
    movb $1, wake_pending
    end_of_interrupt
.globl on_spurious
on_spurious:
    iretq

# The halt gate. Entered with interrupts off, so nothing comes between the look and the halt;
# ring 3 has interrupts on afterwards, which is also how it gets them in the first place.
.globl on_halt
on_halt:
    orl $0x200, 16(%rsp)
    cmpb $0, wake_pending
    jne 1f
    sti
    hlt
1:  iretq

# Exceptions: note where and why, then go on in ring 3 where there is a console.
.macro fault vector, has_code
fault_\vector:
    .if \has_code == 0
    pushq $0
    .endif
    pushq $\vector
    jmp fault_common
.endm

.altmacro
.macro fault_number n
    .if (\n == 8) || (\n == 10) || (\n == 11) || (\n == 12) || (\n == 13) || (\n == 14) || (\n == 17) || (\n == 21)
        fault \n, 1
    .else
        fault \n, 0
    .endif
.endm
.set i, 0
.rept 32
    fault_number %i
    .set i, i + 1
.endr

fault_common:
    popq fault_vector
    popq fault_code
    mov (%rsp), %rax
    mov %rax, fault_rip
    mov %cr2, %rax
    mov %rax, fault_address
    pushq $0x23
    pushq $fault_stack_top - 8          # aligned as if called
    pushq $0x3202
    pushq $0x1B
    pushq $guest_fault
    iretq

.section .rodata.boot, "a"
.balign 8
.macro fault_entry n
    .quad fault_\n
.endm
.globl fault_handlers
fault_handlers:
.set i, 0
.rept 32
    fault_entry %i
    .set i, i + 1
.endr
.noaltmacro

# --- tables --------------------------------------------------------------------------------------

.section .tables, "aw"
.balign 4096
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
pdpt:
    .quad pd0 + 7
    .quad pd0 + 0x1000 + 7
    .quad pd0 + 0x2000 + 7
    .quad pd0 + 0x3000 + 7
    .fill 508, 8, 0
pd0:                                    # the first 4 GiB, one to one, by 2 MiB, open to ring 3
.set address, 0
.rept 2048
    .quad address + 0x87
    .set address, address + 0x200000
.endr

.balign 16
gdt:
    .quad 0
    .quad 0x00AF9B000000FFFF            # 0x08 ring 0 code
    .quad 0x00CF93000000FFFF            # 0x10 ring 0 data
    .quad 0x00AFFB000000FFFF            # 0x18 ring 3 code
    .quad 0x00CFF3000000FFFF            # 0x20 ring 3 data
gdt_tss:
    .quad 0x0000890000000000 + tss_end - tss - 1    # 0x28 TSS
    .quad 0
gdt_end:
gdtr:
    .word gdt_end - gdt - 1
    .quad gdt
idtr:
    .word 256 * 16 - 1
    .quad idt

.balign 16
tss:
    .long 0
    .quad ring0_stack_top
    .fill 0x66 - 12, 1, 0
    .word 0x68
    .fill 8192, 1, 0                    # every port is open, wherever the privilege level is lost
    .byte 0xFF
tss_end:

.section .bss.boot, "aw", @nobits
.balign 4096
.globl idt
idt:
    .skip 4096
    .skip 4096
ring0_stack_top:
    .skip 16384
fault_stack_top:
    .skip 262144
ring3_stack_top:
.balign 8
.globl fault_vector, fault_code, fault_rip, fault_address, wake_pending
fault_vector:  .skip 8
fault_code:    .skip 8
fault_rip:     .skip 8
fault_address: .skip 8
wake_pending: .skip 8

# --- PVH: the 32-bit entry point, for loaders that prefer it ---------------------------------------

.section .note.pvh, "a", @note
.balign 4
    .long 4, 8, 18                      # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad _start
