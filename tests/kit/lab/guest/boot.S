/* Entry of the test guest: multiboot header, stack, a flat GDT (the loader's own may not be relied on), then C. */
        .set MULTIBOOT_MAGIC, 0x1BADB002
        .set MULTIBOOT_FLAGS, 0x00000003        /* page-aligned modules, memory sizes in the info block */

        .section .multiboot, "a"
        .align 4
        .long MULTIBOOT_MAGIC
        .long MULTIBOOT_FLAGS
        .long -(MULTIBOOT_MAGIC + MULTIBOOT_FLAGS)

        .section .data
        .align 8
gdt:    .quad 0
        .quad 0x00CF9A000000FFFF                /* 0x08: code, 4 GiB, 32 bits */
        .quad 0x00CF92000000FFFF                /* 0x10: data, 4 GiB */
gdt_end:
gdtr:   .word gdt_end - gdt - 1
        .long gdt

        .section .bss
        .align 16
stack:  .skip 16384
stack_end:

        .section .text
        .globl _start
_start:
        cli
        lgdt gdtr
        ljmp $0x08, $1f
1:      mov $0x10, %ax
        mov %ax, %ds
        mov %ax, %es
        mov %ax, %fs
        mov %ax, %gs
        mov %ax, %ss
        mov $stack_end, %esp
        push %ebx                               /* the multiboot info block */
        call guest_main
2:      cli
        hlt
        jmp 2b

        .section .note.GNU-stack, "", @progbits
