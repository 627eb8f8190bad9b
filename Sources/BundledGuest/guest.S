// SPDX-License-Identifier: Apache-2.0
// The bundled guest's ELF file, as it comes from guests/kernel.
#if !__has_include("guest.elf")
#error "the bundled guest is not built yet: run `make guest` once (it builds guests/kernel), then `swift build` again"
#endif
    .section .rodata
    .balign 4096
    .globl swkvm_bundled_guest
    .globl swkvm_bundled_guest_end
swkvm_bundled_guest:
    .incbin "guest.elf"
swkvm_bundled_guest_end:
    .section .note.GNU-stack, "", @progbits
