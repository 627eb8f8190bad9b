// SPDX-License-Identifier: Apache-2.0
// Lists the functions that a program executes, and the variables that it has changed when it ends:
//   order RUN IDLE PROGRAM ARGUMENTS… 3>LIST
// Each function is listed once in each phase: as "start NAME" if it is entered before the first function whose name begins
// with RUN, then as "run NAME" until one whose name begins with IDLE is entered, and as "idle NAME" from then on.
// Variables are "data NAME". A breakpoint on each function's first instruction is
// removed when it is reached, so the program runs nearly as fast as without. The program is static, at a fixed address,
// and has its symbols. Its calls of madvise, which could drop the breakpoints with the pages they are in, do nothing.
#define _GNU_SOURCE
#include <elf.h>
#include <err.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

struct symbol {
    unsigned long address, size;
    const char *name, *contents;  // in the file; no contents for a variable that begins as zero
    bool isFunction, isArmed;
};

static struct symbol *symbols;
static size_t count;
static int memory;  // the program's
static FILE *list;

static int byAddress(const void *first, const void *second) {
    unsigned long a = ((const struct symbol *)first)->address, b = ((const struct symbol *)second)->address;
    return a < b ? -1 : a > b;
}

static void readSymbols(const char *path) {
    int file = open(path, O_RDONLY | O_CLOEXEC);
    struct stat status;
    if (file < 0 || fstat(file, &status) < 0) err(1, "%s", path);
    const char *image = mmap(NULL, status.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    if (image == MAP_FAILED) err(1, "%s", path);
    const Elf64_Ehdr *header = (const void *)image;
    const Elf64_Shdr *sections = (const void *)(image + header->e_shoff);
    for (int section = 0; section < header->e_shnum; section++) {
        if (sections[section].sh_type != SHT_SYMTAB) continue;
        const Elf64_Sym *table = (const void *)(image + sections[section].sh_offset);
        const char *names = image + sections[sections[section].sh_link].sh_offset;
        size_t entries = sections[section].sh_size / sizeof *table;
        symbols = calloc(entries, sizeof *symbols);
        if (!symbols) err(1, "memory");
        for (size_t entry = 0; entry < entries; entry++) {
            int type = ELF64_ST_TYPE(table[entry].st_info);
            if (!table[entry].st_size || !table[entry].st_shndx || table[entry].st_shndx >= header->e_shnum) continue;
            const Elf64_Shdr *home = &sections[table[entry].st_shndx];
            bool isFunction = home->sh_flags & SHF_EXECINSTR;
            if (isFunction ? type != STT_FUNC && type != STT_GNU_IFUNC : type != STT_OBJECT || !(home->sh_flags & SHF_WRITE))
                continue;
            symbols[count++] = (struct symbol){
                .address = table[entry].st_value, .size = table[entry].st_size, .name = names + table[entry].st_name,
                .contents = home->sh_type == SHT_NOBITS ? NULL : image + home->sh_offset + table[entry].st_value - home->sh_addr,
                .isFunction = isFunction,
            };
        }
    }
    if (!count) errx(1, "%s has no symbols", path);
    qsort(symbols, count, sizeof *symbols, byAddress);
}

// The functions at an address have one breakpoint, at the first of them.
static void arm(void) {
    const char trap = (char)0xcc;
    for (size_t index = 0; index < count; index++) {
        struct symbol *symbol = &symbols[index];
        if (!symbol->isFunction || symbol->isArmed) continue;
        if (index > 0 && symbols[index - 1].isFunction && symbols[index - 1].address == symbol->address) continue;
        if (pwrite(memory, &trap, 1, symbol->address) != 1) err(1, "cannot set a breakpoint");
        symbol->isArmed = true;
    }
}

static bool isMadvise(const struct symbol *symbol) {
    for (unsigned long address = symbol->address; symbol < symbols + count && symbol->address == address; symbol++)
        if (symbol->isFunction && strcmp(symbol->name, "madvise") == 0) return true;
    return false;
}

// Returns the first function at an address.
static struct symbol *function(unsigned long address) {
    size_t low = 0, high = count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (symbols[middle].address < address) low = middle + 1; else high = middle;
    }
    return low < count && symbols[low].address == address && symbols[low].isFunction ? &symbols[low] : NULL;
}

static void listChanged(void) {
    for (size_t index = 0; index < count; index++) {
        struct symbol *symbol = &symbols[index];
        if (symbol->isFunction) continue;
        char *now = malloc(symbol->size);
        bool isChanged = false;
        if (now && pread(memory, now, symbol->size, symbol->address) == (ssize_t)symbol->size)
            for (size_t byte = 0; byte < symbol->size && !isChanged; byte++)
                isChanged = now[byte] != (symbol->contents ? symbol->contents[byte] : 0);
        if (isChanged) fprintf(list, "data %s\n", symbol->name);
        free(now);
    }
}

int main(int argumentCount, char **arguments) {
    if (argumentCount < 4) errx(1, "usage: order RUN IDLE PROGRAM ARGUMENTS… 3>LIST");
    list = fdopen(3, "w");
    if (!list) err(1, "descriptor 3");
    // Whoever ends the program by a signal has the list until then.
    setvbuf(list, NULL, _IOLBF, BUFSIZ);
    const char *const phases[] = {"start", "run", "idle"}, *boundaries[] = {arguments[1], arguments[2]};
    char **program = arguments + 3;
    readSymbols(*program);
    pid_t leader = fork();
    if (leader < 0) err(1, "fork");
    if (leader == 0) {
        close(3);
        ptrace(PTRACE_TRACEME, 0, 0, 0);
        raise(SIGSTOP);
        execv(*program, program);
        err(127, "%s", *program);
    }
    int status;
    waitpid(leader, &status, 0);
    ptrace(PTRACE_SETOPTIONS, leader, 0, PTRACE_O_TRACECLONE | PTRACE_O_TRACEEXEC | PTRACE_O_TRACEEXIT | PTRACE_O_EXITKILL);
    ptrace(PTRACE_CONT, leader, 0, 0);
    if (waitpid(leader, &status, 0) != leader || !WIFSTOPPED(status)) errx(1, "%s does not start", *program);
    char path[40];
    snprintf(path, sizeof path, "/proc/%d/mem", leader);
    memory = open(path, O_RDWR | O_CLOEXEC);
    if (memory < 0) err(1, "%s", path);
    arm();
    ptrace(PTRACE_CONT, leader, 0, 0);
    int phase = 0;
    for (;;) {
        pid_t thread = waitpid(-1, &status, __WALL);
        if (thread < 0) err(1, "waitpid");
        if (!WIFSTOPPED(status)) {
            if (thread != leader) continue;
            fclose(list);
            return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
        }
        int number = WSTOPSIG(status), event = status >> 16;
        if (event == PTRACE_EVENT_EXIT && thread == leader) listChanged();
        // A thread that has just been created stops once.
        if (event || number == SIGSTOP) number = 0;
        struct user_regs_struct registers;
        if (number == SIGTRAP && ptrace(PTRACE_GETREGS, thread, 0, &registers) == 0) {
            struct symbol *symbol = function(registers.rip - 1);
            if (symbol) {
                // Another thread may have been here in the meantime.
                if (symbol->isArmed && isMadvise(symbol)) {
                    // As if it had returned 0.
                    unsigned long address;
                    if (pread(memory, &address, sizeof address, registers.rsp) != sizeof address) err(1, "the stack");
                    registers.rax = 0;
                    registers.rsp += sizeof address;
                    registers.rip = address + 1;
                    fprintf(list, "%s madvise\n", phases[phase]);
                } else if (symbol->isArmed) {
                    if (phase < 2 && strncmp(symbol->name, boundaries[phase], strlen(boundaries[phase])) == 0) {
                        phase++;
                        arm();
                    }
                    if (pwrite(memory, symbol->contents, 1, symbol->address) != 1) err(1, "cannot remove a breakpoint");
                    symbol->isArmed = false;
                    // Any of the names may be that of the section.
                    for (struct symbol *same = symbol; same < symbols + count && same->address == symbol->address; same++)
                        if (same->isFunction) fprintf(list, "%s %s\n", phases[phase], same->name);
                }
                registers.rip--;
                ptrace(PTRACE_SETREGS, thread, 0, &registers);
                number = 0;
            }
        }
        ptrace(PTRACE_CONT, thread, 0, number);
    }
}
