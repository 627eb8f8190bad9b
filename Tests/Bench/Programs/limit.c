// SPDX-License-Identifier: Apache-2.0
// A minimal program on /dev/kvm, as a reference for swkvm. It checks for errors and does nothing else.
//
//   limit bare                     a VM, one page, one vCPU, one `out` in real mode
//   limit full MIB                 also PIC, IOAPIC, PIT, RAM and CPUID, and the `out` in long mode
//   limit boot ELF MIB [CMDLINE]   loads a kernel the way swkvm does and answers its ports until it powers off. The last line
//                                  on standard error is `run NANOSECONDS`: from the first KVM_RUN to the end.
#include <elf.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { GDT = 0x500, START_INFO = 0x600, MEMORY_MAP = 0x700, PAGE_TABLES = 0x9000, COMMAND_LINE = 0x20000, KERNEL = 0x100000 };

static struct {
    int kvm, vm, cpu;
    size_t size;
    uint8_t *ram;
    struct kvm_run *run;
} m;

static long check(long result, const char *what) {
    if (result < 0) {
        perror(what);
        exit(1);
    }
    return result;
}

static void make_machine(size_t size, int full) {
    m.size = size;
    m.kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
    m.vm = check(ioctl(m.kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    m.ram = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (m.ram == MAP_FAILED) check(-1, "mmap");
    struct kvm_userspace_memory_region region = {.memory_size = size, .userspace_addr = (uintptr_t)m.ram};
    check(ioctl(m.vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
    if (full) {  // after the memory, which would otherwise wait for the kernel's clean-up after these
        uint64_t identity = 0xfffbc000;
        struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY};
        check(ioctl(m.vm, KVM_SET_TSS_ADDR, 0xfffbd000ul), "KVM_SET_TSS_ADDR");
        check(ioctl(m.vm, KVM_SET_IDENTITY_MAP_ADDR, &identity), "KVM_SET_IDENTITY_MAP_ADDR");
        check(ioctl(m.vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
        check(ioctl(m.vm, KVM_CREATE_PIT2, &pit), "KVM_CREATE_PIT2");
    }
    m.cpu = check(ioctl(m.vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    long run = check(ioctl(m.kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    m.run = mmap(NULL, run, PROT_READ | PROT_WRITE, MAP_SHARED, m.cpu, 0);
    if (m.run == MAP_FAILED) check(-1, "mmap of kvm_run");
    if (full) {
        static struct {
            struct kvm_cpuid2 header;
            struct kvm_cpuid_entry2 entries[256];
        } leaves = {.header.nent = 256};
        check(ioctl(m.kvm, KVM_GET_SUPPORTED_CPUID, &leaves), "KVM_GET_SUPPORTED_CPUID");
        check(ioctl(m.cpu, KVM_SET_CPUID2, &leaves), "KVM_SET_CPUID2");
    }
}

static void start_real_mode(uint64_t rip) {
    struct kvm_sregs sregs;
    struct kvm_regs regs = {.rip = rip, .rflags = 2};
    check(ioctl(m.cpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    sregs.cs.base = sregs.cs.selector = 0;
    check(ioctl(m.cpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
    check(ioctl(m.cpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

// Long mode in ring 0, the first 4 GiB mapped to themselves in 2 MiB pages.
static void start_long_mode(uint64_t rip) {
    uint64_t *tables = (uint64_t *)(m.ram + PAGE_TABLES), *gdt = (uint64_t *)(m.ram + GDT);
    tables[0] = (PAGE_TABLES + 0x1000) | 3;
    for (uint64_t gib = 0; gib < 4; gib++) tables[512 + gib] = (PAGE_TABLES + 0x2000 + 0x1000 * gib) | 3;
    for (uint64_t page = 0; page < 2048; page++) tables[1024 + page] = page << 21 | 0x83;
    gdt[2] = 0x00af9b000000ffff;
    gdt[3] = 0x00cf93000000ffff;

    struct kvm_sregs sregs;
    struct kvm_regs regs = {.rip = rip, .rflags = 2, .rdi = START_INFO};
    check(ioctl(m.cpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    sregs.cs = (struct kvm_segment){.limit = ~0u, .selector = 0x10, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1};
    sregs.ds = sregs.es = sregs.ss = sregs.fs = sregs.gs =
        (struct kvm_segment){.limit = ~0u, .selector = 0x18, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1};
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 31;
    sregs.cr0 = 0x80010033;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = 0x20;
    sregs.efer = 0x500;
    check(ioctl(m.cpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
    check(ioctl(m.cpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

// Copies the ELF's segments; returns the address of the swkvm note if there is one, else e_entry.
static uint64_t load(const char *path) {
    int file = check(open(path, O_RDONLY | O_CLOEXEC), path);
    off_t length = check(lseek(file, 0, SEEK_END), path);
    uint8_t *image = mmap(NULL, length, PROT_READ, MAP_PRIVATE, file, 0);
    if (image == MAP_FAILED) check(-1, path);
    Elf64_Ehdr *header = (Elf64_Ehdr *)image;
    Elf64_Phdr *part = (Elf64_Phdr *)(image + header->e_phoff);
    uint64_t entry = header->e_entry;
    for (int i = 0; i < header->e_phnum; i++, part++) {
        if (part->p_type == PT_LOAD) {
            if (part->p_paddr + part->p_memsz > m.size) exit(1);
            memcpy(m.ram + part->p_paddr, image + part->p_offset, part->p_filesz);
        }
        for (uint64_t at = 0; part->p_type == PT_NOTE && at < part->p_filesz;) {
            Elf64_Nhdr *note = (Elf64_Nhdr *)(image + part->p_offset + at);
            const char *name = (char *)(note + 1);
            uint64_t content = sizeof *note + ((note->n_namesz + 3) & ~3u);
            if (note->n_type == 1 && !strcmp(name, "swkvm")) memcpy(&entry, (uint8_t *)note + content, 8);
            at += content + ((note->n_descsz + 3) & ~3u);
        }
    }
    return entry;
}

static void describe(const char *command_line) {
    struct {
        uint32_t magic, version, flags, modules;
        uint64_t module_list, command_line, rsdp, map;
        uint32_t entries, reserved;
    } info = {.magic = 0x336ec578, .version = 1, .command_line = COMMAND_LINE, .map = MEMORY_MAP, .entries = 1};
    struct {
        uint64_t start, size;
        uint32_t type, reserved;
    } map = {.start = KERNEL, .size = m.size - KERNEL, .type = 1};
    memcpy(m.ram + START_INFO, &info, sizeof info);
    memcpy(m.ram + MEMORY_MAP, &map, sizeof map);
    strcpy((char *)m.ram + COMMAND_LINE, command_line);
}

// The exit loop: the minimum of swkvm's.
static void serve(void) {
    while (1) {
        check(ioctl(m.cpu, KVM_RUN, 0), "KVM_RUN");
        struct kvm_run *run = m.run;
        uint8_t *data = (uint8_t *)run + run->io.data_offset;
        switch (run->exit_reason) {
        case KVM_EXIT_IO:
            if (run->io.direction == KVM_EXIT_IO_IN) {
                memset(data, run->io.port == 0x3fd ? 0x60 : 0xff, run->io.size * run->io.count);
            } else if (run->io.port == 0x3f8) {
                if (write(STDOUT_FILENO, data, run->io.count) < 0) exit(1);
            } else if (run->io.port == 0x600 || run->io.port == 0x501) {
                return;
            }
            break;
        case KVM_EXIT_MMIO:
            if (!run->mmio.is_write) *(uint64_t *)run->mmio.data = 0x74726976;
            break;
        default: fprintf(stderr, "exit reason %u\n", run->exit_reason); exit(1);
        }
    }
}

int main(int count, char **words) {
    static const uint8_t out[] = {0xe6, 0x80};  // out %al, $0x80
    const char *mode = count > 1 ? words[1] : "";
    if (!strcmp(mode, "bare") && count == 2) {
        make_machine(4096, 0);
        memcpy(m.ram, out, sizeof out);
        start_real_mode(0);
    } else if (!strcmp(mode, "full") && count == 3) {
        make_machine(strtoul(words[2], NULL, 10) << 20, 1);
        memcpy(m.ram + KERNEL, out, sizeof out);
        start_long_mode(KERNEL);
    } else if (!strcmp(mode, "boot") && count >= 4) {
        struct timespec start, end;
        make_machine(strtoul(words[3], NULL, 10) << 20, 1);
        uint64_t entry = load(words[2]);
        describe(count > 4 ? words[4] : "");
        start_long_mode(entry);
        clock_gettime(CLOCK_MONOTONIC, &start);
        serve();
        clock_gettime(CLOCK_MONOTONIC, &end);
        fprintf(stderr, "run %ld\n", (end.tv_sec - start.tv_sec) * 1000000000 + end.tv_nsec - start.tv_nsec);
        return 0;
    } else {
        fprintf(stderr, "limit bare | full MIB | boot ELF MIB [CMDLINE]\n");
        return 2;
    }
    check(ioctl(m.cpu, KVM_RUN, 0), "KVM_RUN");
    return m.run->exit_reason == KVM_EXIT_IO ? 0 : 1;
}
