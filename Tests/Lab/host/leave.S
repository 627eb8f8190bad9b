// SPDX-License-Identifier: Apache-2.0
// leave N: writes N to port 0x501, QEMU's isa-debug-exit, which ends the emulator with status 2N+1.
    .intel_syntax noprefix
    .globl _start
_start:
    mov     edi, 3                  // iopl(3): this program may use ports
    mov     eax, 172
    syscall
    mov     rsi, [rsp + 16]         // argv[1]
    movzx   eax, byte ptr [rsi]     // one digit is enough
    sub     eax, '0'
    mov     edx, 0x501
    out     dx, al
    mov     edi, 1                  // still here: there is no such device
    mov     eax, 60
    syscall
