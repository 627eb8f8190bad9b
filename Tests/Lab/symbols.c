// SPDX-License-Identifier: Apache-2.0
// symbols FILE: creates an ELF file with the symbols of standard input, a line `ADDRESS KIND NAME` for each as in /proc/kallsyms, for a debugger.
// It contains no code: a section without contents covers the addresses from 0xffffffff81000000 on.
#include <elf.h>
#include <stdio.h>
#include <string.h>

enum { MOST = 1024, NAME = 128 };
static const char sectionNames[] = "\0.text\0.symtab\0.strtab";

int main(int argc, char **argv) {
    static Elf64_Sym symbols[MOST];
    static char names[MOST * NAME];
    size_t count = 1, length = 1;
    unsigned long address;
    char kind, name[NAME];
    while (count < MOST && scanf(" %lx %c %127s", &address, &kind, name) == 3) {
        unsigned char type = strchr("tT", kind) ? STT_FUNC : STT_OBJECT;
        symbols[count++] = (Elf64_Sym){.st_name = length, .st_info = ELF64_ST_INFO(STB_GLOBAL, type), .st_shndx = 1, .st_value = address};
        memcpy(names + length, name, strlen(name) + 1);
        length += strlen(name) + 1;
    }
    const size_t table = sizeof(Elf64_Ehdr) + 4 * sizeof(Elf64_Shdr), strings = table + count * sizeof symbols[0];
    const Elf64_Ehdr header = {
        .e_ident = {ELFMAG0, ELFMAG1, ELFMAG2, ELFMAG3, ELFCLASS64, ELFDATA2LSB, EV_CURRENT}, .e_type = ET_EXEC, .e_machine = EM_X86_64,
        .e_version = EV_CURRENT, .e_shoff = sizeof header, .e_ehsize = sizeof header, .e_shentsize = sizeof(Elf64_Shdr), .e_shnum = 4, .e_shstrndx = 3};
    const Elf64_Shdr sections[4] = {
        {0},
        {.sh_name = 1, .sh_type = SHT_NOBITS, .sh_flags = SHF_ALLOC | SHF_EXECINSTR, .sh_addr = 0xffffffff81000000, .sh_offset = table, .sh_size = 64 << 20, .sh_addralign = 1},
        {.sh_name = 7, .sh_type = SHT_SYMTAB, .sh_offset = table, .sh_size = count * sizeof symbols[0], .sh_link = 3, .sh_info = 1, .sh_addralign = 8, .sh_entsize = sizeof symbols[0]},
        // The names of symbols, then those of the sections.
        {.sh_name = 15, .sh_type = SHT_STRTAB, .sh_offset = strings, .sh_size = length + sizeof sectionNames, .sh_addralign = 1}};
    Elf64_Shdr written[4];
    memcpy(written, sections, sizeof written);
    for (int i = 1; i < 4; i++) written[i].sh_name += length;
    FILE *file = argc == 2 ? fopen(argv[1], "w") : NULL;
    if (!file || count == 1) return fprintf(stderr, "symbols FILE, with lines of symbols as its input\n"), 2;
    fwrite(&header, sizeof header, 1, file);
    fwrite(written, sizeof written, 1, file);
    fwrite(symbols, sizeof symbols[0], count, file);
    fwrite(names, 1, length, file);
    fwrite(sectionNames, 1, sizeof sectionNames, file);
    return fclose(file) == 0 ? 0 : 1;
}
