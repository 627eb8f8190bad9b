// SPDX-License-Identifier: Apache-2.0
// The report of a fault of swkvm itself: a trap by Swift's checks, an access to an address that is not mapped.
// A static binary is without a symbol table and its core file is off, so the addresses are all that leads to the line.

#define _GNU_SOURCE
#include "CSandbox.h"
#include "Line.h"

#include <elf.h>
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <ucontext.h>

static const struct {
    int number;
    const char *name;
} faults[] = {
    {SIGILL, "SIGILL"}, {SIGTRAP, "SIGTRAP"}, {SIGSEGV, "SIGSEGV"}, {SIGBUS, "SIGBUS"}, {SIGFPE, "SIGFPE"}, {SIGABRT, "SIGABRT"},
};

static char prefix_of_lines[64];
static int status_of_fault;

// The linker's: where the file's first byte is mapped.
extern const Elf64_Ehdr __ehdr_start __attribute__((weak, visibility("hidden")));

/// An address as the ELF file has it, also in a binary that is loaded anywhere.
static uint64_t in_file(uint64_t address) {
    int moves = &__ehdr_start && __ehdr_start.e_type == ET_DYN;
    return moves ? address - (uint64_t)(uintptr_t)&__ehdr_start : address;
}

static void add_address(struct line *line, uint64_t address) {
    add(line, "0x");
    add_number(line, address, 16);
}

/// Adds the build ID of the note that the linker has made (NT_GNU_BUILD_ID), if there is one.
static void add_build_id(struct line *line) {
    if (!&__ehdr_start) return;
    const char *base = (const char *)&__ehdr_start;
    const Elf64_Phdr *segments = (const Elf64_Phdr *)(base + __ehdr_start.e_phoff);
    for (int i = 0; i < __ehdr_start.e_phnum; i++) {
        if (segments[i].p_type != PT_NOTE) continue;
        const char *start = (const char *)(uintptr_t)segments[i].p_vaddr;
        if (__ehdr_start.e_type == ET_DYN) start = base + segments[i].p_vaddr;
        for (uint64_t offset = 0; offset + sizeof(Elf64_Nhdr) <= segments[i].p_memsz;) {
            const Elf64_Nhdr *note = (const Elf64_Nhdr *)(start + offset);
            const char *name = (const char *)(note + 1);
            const unsigned char *id = (const unsigned char *)name + ((note->n_namesz + 3) & ~3u);
            if (note->n_type == NT_GNU_BUILD_ID && note->n_namesz == 4 && memcmp(name, "GNU", 4) == 0) {
                add(line, ", build ID ");
                for (uint32_t byte = 0; byte < note->n_descsz; byte++) {
                    add_number(line, id[byte] >> 4, 16);
                    add_number(line, id[byte] & 15, 16);
                }
                return;
            }
            offset += sizeof *note + ((note->n_namesz + 3) & ~3u) + ((note->n_descsz + 3) & ~3u);
        }
    }
}

/// Prints the return addresses of the frames, which Swift's and our own code link through RBP.
static void say_callers(const greg_t *registers) {
    struct line line = {.count = 0};
    add(&line, prefix_of_lines);
    add(&line, "called from");
    uint64_t frame = (uint64_t)registers[REG_RBP], last = (uint64_t)registers[REG_RSP];
    int count = 0;
    // Frames lie one above the other, within a stack. A frame that is none ends the process in `fault`.
    for (; count < 16 && frame >= last && frame - last < 1 << 20 && frame % 8 == 0; count++) {
        const uint64_t *words = (const uint64_t *)(uintptr_t)frame;
        if (words[1] == 0) break;
        add(&line, " ");
        add_address(&line, in_file(words[1]));
        last = frame + 16;
        frame = words[0];
    }
    add(&line, "\n");
    if (count > 0) say(&line, 0);
}

static void fault(int signal, siginfo_t *information, void *context) {
    // Sent by a process: not by a fault. abort sends its own.
    if (information->si_code <= 0 && information->si_pid != getpid()) {
        struct sigaction action;
        memset(&action, 0, sizeof action);
        action.sa_handler = SIG_DFL;
        sigaction(signal, &action, 0);
        syscall(SYS_tgkill, getpid(), (int)syscall(SYS_gettid), signal);
        return;
    }
    // A second fault is one of this function, or one of another thread at the same moment, which lets the first report get out.
    static atomic_int reporting;
    int thread = (int)syscall(SYS_gettid), nobody = 0;
    if (!atomic_compare_exchange_strong(&reporting, &nobody, thread)) {
        for (int i = 0; nobody != thread && i < 100000000; i++) __builtin_ia32_pause();
        _exit(status_of_fault);
    }
    const greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    char name[16] = "";
    prctl(PR_GET_NAME, name, 0, 0, 0);

    struct line line = {.count = 0};
    add(&line, prefix_of_lines);
    add(&line, "internal error: ");
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        if (faults[i].number == signal) add(&line, faults[i].name);
    add(&line, " at program counter ");
    add_address(&line, in_file((uint64_t)registers[REG_RIP]));
    if (information->si_code > 0 && (signal == SIGSEGV || signal == SIGBUS)) {
        add(&line, ", accessing address ");
        add_address(&line, (uint64_t)(uintptr_t)information->si_addr);
    }
    add(&line, ", in the thread '");
    add(&line, name);
    add(&line, "'");
    add_build_id(&line);
    add(&line, ": please report this bug of swkvm\n");
    say(&line, 0);
    say_callers(registers);
    _exit(status_of_fault);
}

int csandbox_report_faults(const char *prefix, int exit_status) {
    strncpy(prefix_of_lines, prefix, sizeof prefix_of_lines - 1);
    status_of_fault = exit_status;
    // For a thread that has used up its own. Of the main thread only: no other one has code that recurses.
    static char stack[16 << 10];
    stack_t alternate = {.ss_sp = stack, .ss_size = sizeof stack};
    if (sigaltstack(&alternate, 0) < 0) return errno;
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = fault;
    // A fault in the handler comes to it again, and ends there.
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        if (sigaction(faults[i].number, &action, 0) < 0) return errno;
    return 0;
}
