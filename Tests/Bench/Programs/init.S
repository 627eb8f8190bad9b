// SPDX-License-Identifier: Apache-2.0
// The whole user space of the Linux guest: turns the machine off.

    .text
    .global _start
_start:
    mov     $169, %eax                      // reboot(2)
    mov     $0xfee1dead, %edi
    mov     $672274793, %esi
    mov     $0x4321fedc, %edx               // LINUX_REBOOT_CMD_POWER_OFF
    syscall
    ud2
