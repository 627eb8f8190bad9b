// SPDX-License-Identifier: Apache-2.0
// Instructions that Swift cannot express, calls of ring 0's services (entry.S), and functions that its compiler calls. All of it runs in ring 3.

    .text
    .macro  function name:req
    .balign 16
    .global \name
\name:
    .endm

function coreTableAddress
    mov     $coreTable, %eax
    ret

function readPort8
    mov     %edi, %edx
    xor     %eax, %eax
    in      %dx, %al
    ret
function writePort8
    mov     %edi, %edx
    mov     %esi, %eax
    out     %al, %dx
    ret

function timestamp
    rdtsc
    shl     $32, %rdx
    or      %rdx, %rax
    ret
function processorIdentification            // (leaf, subleaf, four words)
    push    %rbx
    mov     %rdx, %r8
    mov     %edi, %eax
    mov     %esi, %ecx
    mov     $6, %r11d
    int3
    mov     %eax, (%r8)
    mov     %ebx, 4(%r8)
    mov     %ecx, 8(%r8)
    mov     %edx, 12(%r8)
    pop     %rbx
    ret
function fence
    mfence
    ret
function spinPause
    pause
    ret
function exchange                           // (address, value) → the old value
    mov     %rsi, %rax
    xchg    %rax, (%rdi)
    ret
function fetchAdd                           // (address, value) → the old value
    mov     %rsi, %rax
    lock xadd %rax, (%rdi)
    ret

// The services of ring 0.

function idle
    xor     %r11d, %r11d
    int3
    ret
function writeMSR
    mov     %edi, %ecx
    mov     %esi, %eax
    mov     %rsi, %rdx
    shr     $32, %rdx
    mov     $1, %r11d
    int3
    ret
function outputBytes                        // (port, address, count)
    mov     %rdx, %rcx
    mov     %edi, %edx
    mov     $2, %r11d
    int3
    ret
function reloadPageTables
    mov     $3, %r11d
    int3
    ret
function crashByTripleFault
    mov     $4, %r11d
    int3
    ret
function crashByInternalError
    mov     $5, %r11d
    int3
    ret

// Functions that the Swift compiler and its library call.

function posix_memalign
    jmp     heapAllocate
function free
    jmp     heapRelease
function memcpy
    mov     %rdi, %rax
    mov     %rdx, %rcx
    rep movsb
    ret
function memset
    mov     %rdi, %r8
    mov     %esi, %eax
    mov     %rdx, %rcx
    rep stosb
    mov     %r8, %rax
    ret
function memmove
    mov     %rdi, %rax
    mov     %rdx, %rcx
    mov     %rdi, %r8
    sub     %rsi, %r8
    cmp     %rdx, %r8
    jb      1f                              // the destination begins inside the source: copies from the end
    rep movsb
    ret
1:  lea     -1(%rdi, %rdx), %rdi
    lea     -1(%rsi, %rdx), %rsi
    std
    rep movsb
    cld
    ret
