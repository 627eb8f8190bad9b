// SPDX-License-Identifier: Apache-2.0
// A guest that causes exits to user space repeatedly, and prints how many ticks of the time-stamp counter each kind took:
// four lines of 16 hexadecimal digits. It is entered in long mode, ring 0, with 4 GiB mapped to themselves.

    .set ROUNDS, 4000
    .set SERIAL, 0x3f8
    .set EXIT,   0x501
    .set DEVICE, 0xd0000000                 // a virtio-mmio device's MagicValue
    .set SELECT, 0xd0000030                 // its QueueSel

    .macro  now into:req
    rdtsc
    shl     $32, %rdx
    lea     (%rax, %rdx), \into
    .endm

    .macro  measure
    now     %r8
    mov     $ROUNDS, %ecx
    .endm

    .macro  report
    dec     %ecx
    jnz     1b
    now     %r9
    sub     %r8, %r9
    mov     $digits, %esi
    mov     $17, %ecx
    mov     $SERIAL, %dx
2:  rol     $4, %r9
    mov     %r9d, %eax
    and     $15, %eax
    mov     (%rsi, %rax), %al
    cmp     $1, %ecx
    jne     3f
    mov     $'\n', %al
3:  out     %al, %dx
    dec     %ecx
    jnz     2b
    .endm

    .text
    .global _start
_start:
    mov     $DEVICE, %ebx
    mov     $SELECT, %edi
    xor     %eax, %eax

    mov     $ROUNDS, %ecx                   // uncounted, until the host's CPU has reached its frequency
1:  out     %al, $0x80
    dec     %ecx
    jnz     1b

    measure                                 // port write
1:  out     %al, $0x80
    report

    measure                                 // port read
1:  in      $0x80, %al
    report

    measure                                 // MMIO read
1:  mov     (%rbx), %eax
    report

    xor     %eax, %eax
    measure                                 // MMIO write
1:  mov     %eax, (%rdi)
    report

    xor     %eax, %eax
    mov     $EXIT, %dx
    out     %al, %dx
    hlt

digits:
    .ascii  "0123456789abcdef"
