// SPDX-License-Identifier: Apache-2.0
// All code of ring 0. Instructions that Swift cannot express are in instructions.S.
//
// Ring 0 is as small as possible, because some hosts interpret it (half a microsecond for an instruction): the tables
// are data of the image, an interrupt is three instructions, and the rest, drivers included, is Swift in ring 3.
// KVM's emulator supports all instructions here, except the one of internalErrorService.

    .set PRESENT,     0x001
    .set WRITABLE,    0x002
    .set USER,        0x004
    .set UNCACHED,    0x018                 // PCD | PWT
    .set USED,        0x060                 // accessed | dirty: the CPU need not write them
    .set LARGE,       0x080
    .set TABLE,       PRESENT | WRITABLE | USER | USED
    .set PAGE,        TABLE

    .set KERNEL_CODE, 0x10                  // the selectors of the long-mode entry
    .set USER_DATA,   0x28 | 3
    .set USER_CODE,   0x30 | 3
    .set FIRST_TSS,   0x40
    .set MAX_CPUS,    255

    .set CORE,        0x100000              // kernel.ld puts .core here
    .set TRAMPOLINE,  0x8000                // where an application processor starts in real mode

    .set IA32_EFER,   0xc0000080
    .set EXIT_PORT,   0x501
    .set FAULT_STATUS, 62

// How to enter: in long mode (swkvm's note), or by PVH in 32-bit protected mode.

    .section .note.swkvm, "a", @note
    .balign 4
    .long   6, 8, 1
    .asciz  "swkvm"
    .balign 4
    .quad   entry64

    .section .note.xen, "a", @note
    .balign 4
    .long   4, 8, 18                        // XEN_ELFNOTE_PHYS32_ENTRY
    .asciz  "Xen"
    .quad   entry32

// ---- Page tables: identity, 512 GiB, all of it for ring 3 ------------------------------------------------------------

    .section .core, "awx"
    .global coreStart
coreStart:
pml4:
    .quad   pdpt + TABLE
    .fill   511, 8, 0

    .global pdpt
pdpt:                                       // 1 GiB pages, except the first GiB and the one with the devices
    .quad   pdLow + TABLE
    .set    gib, 1
    .rept   511
    .if     gib == 3
    .quad   pdDevices + TABLE
    .else
    .quad   (gib << 30) + PAGE + LARGE
    .endif
    .set    gib, gib + 1
    .endr

pdLow:                                      // 2 MiB pages, the first of them split
    .quad   ptLow + TABLE
    .set    mib, 2
    .rept   511
    .quad   (mib << 20) + PAGE + LARGE
    .set    mib, mib + 2
    .endr

ptLow:                                      // 4 KiB pages; the first is absent, so that a null pointer faults
    .quad   0
    .set    page, 1
    .rept   511
    .quad   (page << 12) + PAGE
    .set    page, page + 1
    .endr

pdDevices:                                  // 3 – 4 GiB, uncached; its last 2 MiB map the first 2 MiB of RAM again,
    .set    mib, 3072                       // with page 0, which contains boot information
    .rept   511
    .quad   (mib << 20) + PAGE + LARGE + UNCACHED
    .set    mib, mib + 2
    .endr
    .quad   PAGE + LARGE

// ---- Descriptor tables ----------------------------------------------------------------------------------------------

    .balign 16
    .global gdt
gdt:
    .quad   0
    .quad   0
    .quad   0x00af9b000000ffff              // 0x10 ring 0 code, 64-bit
    .quad   0x00cf93000000ffff              // 0x18 ring 0 data
    .quad   0
    .quad   0x00cff3000000ffff              // 0x28 ring 3 data
    .quad   0x00affb000000ffff              // 0x30 ring 3 code, 64-bit
    .quad   0
    .word   TSS_LIMIT                       // 0x40 the boot processor's TSS, below 16 MiB
    .long   bootTSS + 0x89000000
    .word   0
    .quad   0
    .skip   16 * (MAX_CPUS - 1)             // the other CPUs' TSS descriptors: Swift writes them
gdtEnd:

    .balign 8
gdtPointer:
    .word   gdtEnd - gdt - 1
    .quad   gdt
    .balign 8
idtPointer:
    .word   idtEnd - idt - 1
    .quad   idt

    .macro  gate target:req, type:req, stack=0
    .set    offset, CORE + (\target - coreStart)
    .word   offset & 0xffff, KERNEL_CODE
    .byte   \stack, \type
    .word   offset >> 16
    .quad   0
    .endm
    .set    INTERRUPT, 0x8e                 // interrupt gate, ring 0 only
    .set    SERVICE, 0xee                   // interrupt gate that ring 3 may call

    .balign 16
idt:
    .set    vector, 0
    .rept   32                              // exceptions; NMI, #DF and #MC on a stack that is always valid
    .if     vector == 2 || vector == 8 || vector == 18
    gate    (exceptionEntries + 16 * vector), INTERRUPT, 2
    .elseif vector == 3
    gate    service, SERVICE
    .else
    gate    (exceptionEntries + 16 * vector), INTERRUPT
    .endif
    .set    vector, vector + 1
    .endr
    .set    line, 0
    .rept   64                              // vector 0x20 + n: interrupt line n
    gate    (interruptEntries + 32 * line), INTERRUPT, 1
    .set    line, line + 1
    .endr
idtEnd:

// A CPU's block: its ring-0 stacks and, at the end, the word in which interrupts set their bits. IST 1 ends at that
// word, so that it is at a fixed distance from an interrupt's frame.
    .set    FRAME, 40                       // RIP, CS, RFLAGS, RSP, SS
    .set    BLOCK_FAULTS, 0x200             // tops of: IST 2, ring 0 (exceptions and services), IST 1
    .set    BLOCK_RING0, 0x600
    .set    BLOCK_PENDING, 0x700
    .set    BLOCK_FRAME, 0x740              // for an application processor: the frame it enters ring 3 with,
    .set    BLOCK_TASK, 0x768               // and the selector of its TSS
    .set    BLOCK_SIZE, 0x780

// The TSSs of all CPUs are adjacent, and share one open port bitmap after the last.
    .set    TSS_SIZE, 112
    .set    TSS_BITMAP, 0x7000
    .set    TSS_LIMIT, TSS_BITMAP + 0x2000 - 1

    .section .tss, "aw"                     // kernel.ld makes the two adjacent
    .balign 16
    .global bootTSS, moreTSS
bootTSS:
    .long   0
    .quad   bootBlock + BLOCK_RING0, 0, 0, 0
    .quad   bootBlock + BLOCK_PENDING, bootBlock + BLOCK_FAULTS
    .fill   5, 8, 0
    .quad   0
    .word   0, TSS_BITMAP
    .balign 16
    .section .bss.tss, "aw", @nobits
moreTSS:
    .skip   TSS_BITMAP - TSS_SIZE + 0x2000
    .section .bss.block, "aw", @nobits
    .balign 16
bootBlock:
    .skip   BLOCK_SIZE
processorBlocks:                            // by APIC ID
    .skip   8 * 256
    .section .bss.stacks, "aw", @nobits
    .balign 16
    .skip   0x1000
faultStackTop:
    .skip   0x10000
bootStackTop:
    .section .core

// ---- Entry -----------------------------------------------------------------------------------------------------------

    .balign 16
    .code32
entry32:                                    // EBX = hvm_start_info
    mov     %ebx, %edi
    mov     %cr4, %eax
    or      $0x20, %eax                     // PAE
    mov     %eax, %cr4
    mov     $pml4, %eax
    mov     %eax, %cr3
    mov     $IA32_EFER, %ecx
    rdmsr
    or      $0x100, %eax                    // LME
    wrmsr
    mov     $0x80010033, %eax               // PG WP NE ET MP PE
    mov     %eax, %cr0
    lgdt    gdtPointer
    ljmp    $KERNEL_CODE, $entry64

    .code64
    .global entry64
entry64:                                    // RDI = hvm_start_info
    mov     $pml4, %eax
    mov     %rax, %cr3
    lgdt    gdtPointer
    lidt    idtPointer
    mov     $FIRST_TSS, %eax
    ltr     %ax
    mov     $0xff, %al                      // masks the PICs: their default vectors are those of exceptions
    out     %al, $0x21
    out     %al, $0xa1
    mov     $bootFrame, %esp
    iretq                                   // to kernelMain in ring 3

// Copied to TRAMPOLINE; an application processor starts here after INIT and SIPI, and enters long mode directly.
    .balign 16
    .code16
    .global trampolineStart, trampolineEnd
trampolineStart:
    mov     %cs, %ax
    mov     %ax, %ds
    lgdtl   trampolinePointer - trampolineStart
    mov     $0x20, %eax
    mov     %eax, %cr4
    mov     $pml4, %eax
    mov     %eax, %cr3
    mov     $IA32_EFER, %ecx
    rdmsr
    or      $0x100, %eax
    wrmsr
    mov     $0x80010033, %eax
    mov     %eax, %cr0
    ljmpl   $KERNEL_CODE, $processorEntry
    .balign 8
trampolinePointer:
    .word   gdtEnd - gdt - 1
    .long   gdt
trampolineEnd:

    .code64
processorEntry:
    lidt    idtPointer
    xor     %eax, %eax
    cpuid
    cmp     $0xb, %eax
    jb      1f
    mov     $0xb, %eax                      // EDX: the whole x2APIC ID. A message to CPU 1 reaches CPU 257 too, whose
    xor     %ecx, %ecx                      // eight bits are the same: it is one more than this kernel runs, and stays here.
    cpuid
    cmp     $MAX_CPUS, %edx
    jb      1f
2:  hlt
    jmp     2b
1:
    addr32 mov 0xfee00020, %eax             // the APIC ID is the index of this CPU's block
    shr     $24, %eax
    mov     processorBlocks(, %rax, 8), %rdi
    mov     BLOCK_TASK(%rdi), %eax
    ltr     %ax
    lea     BLOCK_FRAME(%rdi), %rsp
    iretq                                   // to processorMain in ring 3, RDI = the block

// ---- Exceptions, interrupts, services --------------------------------------------------------------------------------

    .balign 16
exceptionEntries:
    .set    vector, 0
    .rept   32
    .balign 16
    .if     !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30)
    push    $0
    .endif
    push    $vector
    jmp     exception
    .set    vector, vector + 1
    .endr

exception:                                  // the frame that Fault.swift reads, and on to faultReport in ring 3
    push    %rax
    push    %rbx
    push    %rcx
    push    %rdx
    push    %rsi
    push    %rdi
    push    %rbp
    push    %r8
    push    %r9
    push    %r10
    push    %r11
    push    %r12
    push    %r13
    push    %r14
    push    %r15
    mov     %cr3, %rax
    push    %rax
    mov     %cr2, %rax
    push    %rax
    mov     %rsp, %rdi
    lock btsl $0, faulted
    jc      1f
    mov     $faultFrame, %esp
    iretq
1:  mov     $EXIT_PORT, %edx                // a second fault during the report of the first, or another CPU's: no output
    mov     $FAULT_STATUS, %eax
    out     %al, %dx
    cli
    hlt
    jmp     1b

    .balign 32
interruptEntries:
    .set    line, 0
    .rept   63
    .balign 32
    btsq    $line, FRAME(%rsp)              // pending
    addr32 movl $0, 0xfee000b0              // end of interrupt
    iretq
    .set    line, line + 1
    .endr
    .balign 32
    iretq                                   // 63, vector 0x5f: spurious

// int3 from ring 3, R11 = which: the one software interrupt that every host passes to the guest (int 0x80 is a host's
// 32-bit system call if ring 3 runs natively). Ring 3 is part of the kernel, and has all rights.
    .balign 16
service:
    and     $7, %r11d
    jmp     *services(, %r11, 8)
services:
    .quad   idleService, writeMSRService, outputService, reloadTablesService
    .quad   tripleFaultService, internalErrorService, identificationService, idleService

idleService:                                // sleeps until an interrupt is pending
    cmpq    $0, (BLOCK_PENDING - BLOCK_RING0 + FRAME)(%rsp)
    jne     1f
    sti
    hlt
1:  iretq

writeMSRService:                            // ECX, EDX:EAX
    wrmsr
    iretq

outputService:                              // RCX bytes at RSI to port DX
    rep outsb
    iretq

reloadTablesService:
    mov     %cr3, %rax
    mov     %rax, %cr3
    iretq

identificationService:                      // cpuid of the virtual CPU: in ring 3 some hosts show their own
    cpuid
    iretq

tripleFaultService:
    lidt    nothing
    ud2

internalErrorService:                       // ends the machine if ring 0 is interpreted, and is harmless otherwise
    popcnt  %rax, %rax
    iretq

// ---- Data that ring 0 uses -------------------------------------------------------------------------------------------

    .balign 8
bootFrame:
    .quad   kernelMain, USER_CODE, 0x202, bootStackTop - 8, USER_DATA
faultFrame:
    .quad   faultReport, USER_CODE, 0x002, faultStackTop - 8, USER_DATA
faulted:
    .long   0
nothing:
    .word   0
    .quad   0

// Addresses for Swift (Core.swift has the same order).
    .global coreTable
coreTable:
    .quad   imageEnd, gdt, bootTSS, bootBlock, pdpt
    .quad   trampolineStart, trampolineEnd, processorMain, processorBlocks
