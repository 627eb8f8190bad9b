// SPDX-License-Identifier: Apache-2.0
// Compiles the list of system calls to a seccomp filter: classic BPF (seccomp(2), "Filters").
//
// A call is found by a binary search for its number, and decided by the first of its rules whose condition holds. The kernel runs a filter once
// for each number when it is installed, to know the calls that it need not ask about, so that the search makes an installation several times
// cheaper than a list of comparisons would. All memory is on the stack: it takes some microseconds, at the start of a machine.

#include "CSandbox.h"

/// Numbers from here on are of calls without a rule.
enum { NUMBERS = 512 };

/// An instruction, by how many there are from it to the end: a program is made from its end to its start, so that the target of each jump is known.
typedef unsigned label;

struct assembler {
    struct sock_filter *end;
    unsigned count;
    label allow, refuse;
};

static label emit(struct assembler *program, unsigned code, uint32_t constant, label if_true, label if_false) {
    // A jump of 0 leads to the instruction that was emitted last.
    const struct sock_filter instruction = {
        (uint16_t)code, (uint8_t)(program->count - if_true), (uint8_t)(program->count - if_false), constant};
    // The tests compile every list that there is.
    if (program->count == CSANDBOX_LIMIT) __builtin_trap();
    *--program->end = instruction;
    return ++program->count;
}

static label plain(struct assembler *program, unsigned code, uint32_t constant) {
    return emit(program, code, constant, program->count, program->count);
}

static label jump(struct assembler *program, label target) {
    return plain(program, BPF_JMP | BPF_JA, program->count - target);
}

/// Compares what was loaded with a constant.
static label branch(struct assembler *program, unsigned test, uint32_t constant, label if_true, label if_false) {
    // The distance is a byte, and one jump may come between.
    if (program->count - if_true >= 255) if_true = jump(program, if_true);
    if (program->count - if_false > 255) if_false = jump(program, if_false);
    return emit(program, BPF_JMP | test | BPF_K, constant, if_true, if_false);
}

/// Loads a word of `struct seccomp_data` and continues at `next`.
static label load(struct assembler *program, size_t offset, label next) {
    if (next != program->count) jump(program, next);
    return plain(program, BPF_LD | BPF_W | BPF_ABS, (uint32_t)offset);
}

/// Where the rules of a call begin.
struct head {
    uint16_t label;
    /// The argument to be loaded before; -1 for none.
    int16_t argument;
};

/// Loads the argument that the rules of a call begin with.
static void complete(struct assembler *program, struct head *head) {
    if (head->argument < 0) return;
    // The low word: these calls heed no other.
    size_t offset = offsetof(struct seccomp_data, args) + 8 * (size_t)head->argument;
    *head = (struct head){(uint16_t)load(program, offset, head->label), -1};
}

static uint32_t value_of(const struct csandbox_rule *rule, const struct csandbox_machine *machine) {
    return rule->test == CSANDBOX_OWN_PROCESS ? (uint32_t)machine->process : rule->value;
}

/// Puts a rule before those of its call that are there.
static void prepend(struct assembler *program, struct head *head, const struct csandbox_rule *rule, const struct csandbox_machine *machine) {
    label action = program->allow;
    // A report is about these too, except for what the C library tries with all signals blocked.
    if (rule->error && machine->reports && rule->error != ENOSYS) action = program->refuse;
    else if (rule->error) action = plain(program, BPF_RET | BPF_K, SECCOMP_RET_ERRNO | rule->error);
    if (rule->test == CSANDBOX_ANYTHING) {
        *head = (struct head){(uint16_t)action, -1};
        return;
    }
    if (head->argument >= 0 && head->argument != rule->argument) complete(program, head);
    label rest = head->label, start;
    uint32_t value = value_of(rule, machine);
    switch (rule->test) {
    case CSANDBOX_UNEQUAL: start = branch(program, BPF_JEQ, value, rest, action); break;
    case CSANDBOX_NO_BITS: start = branch(program, BPF_JSET, value, rest, action); break;
    default: start = branch(program, BPF_JEQ, value, action, rest);
    }
    *head = (struct head){(uint16_t)start, rule->argument};
}

/// The search in a part of the ranges, which are `starts` of numbers and where they lead.
static label search(struct assembler *program, const uint16_t *starts, const uint16_t *labels, unsigned count) {
    if (count == 1) return labels[0];
    unsigned middle = count / 2;
    label upper = search(program, starts + middle, labels + middle, count - middle);
    label lower = search(program, starts, labels, middle);
    return branch(program, BPF_JGE, starts[middle], upper, lower);
}

/// Lets calls from one address through.
static label admit(struct assembler *program, uint64_t address, label next) {
    const size_t pointer = offsetof(struct seccomp_data, instruction_pointer);
    label high = branch(program, BPF_JEQ, (uint32_t)(address >> 32), program->allow, next);
    high = load(program, pointer + 4, high);
    label low = branch(program, BPF_JEQ, (uint32_t)address, high, next);
    return load(program, pointer, low);
}

int csandbox_applies(const struct csandbox_rule *rule, const struct csandbox_machine *machine, unsigned threads) {
    if (!(rule->threads & threads)) return 0;
    return rule->need == CSANDBOX_ALWAYS || (machine->needs & 1u << rule->need);
}

const struct sock_filter *csandbox_compile(
    const struct csandbox_machine *machine, unsigned threads, uint32_t fallback, struct sock_filter *buffer, unsigned short *count
) {
    struct assembler program = {.end = buffer + CSANDBOX_LIMIT};
    program.refuse = plain(&program, BPF_RET | BPF_K, fallback);
    program.allow = plain(&program, BPF_RET | BPF_K, SECCOMP_RET_ALLOW);

    struct head heads[NUMBERS + 1];
    for (unsigned number = 0; number <= NUMBERS; number++) heads[number] = (struct head){(uint16_t)program.refuse, -1};
    size_t rules;
    const struct csandbox_rule *rule = csandbox_rules(&rules);
    for (size_t index = rules; index-- > 0;)
        if (csandbox_applies(rule + index, machine, threads)) prepend(&program, &heads[rule[index].call], rule + index, machine);

    // Neighbours with the same rules are one range.
    uint16_t starts[NUMBERS + 1], labels[NUMBERS + 1];
    unsigned ranges = 0;
    for (unsigned number = 0; number <= NUMBERS; number++) {
        complete(&program, &heads[number]);
        if (ranges && labels[ranges - 1] == heads[number].label) continue;
        starts[ranges] = (uint16_t)number;
        labels[ranges++] = heads[number].label;
    }
    label start = load(&program, offsetof(struct seccomp_data, nr), search(&program, starts, labels, ranges));
    if (machine->reports) start = admit(&program, csandbox_passage(), start);
    // Another architecture has other numbers.
    label foreign = plain(&program, BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
    start = branch(&program, BPF_JEQ, CSANDBOX_ARCHITECTURE, start, foreign);
    load(&program, offsetof(struct seccomp_data, arch), start);
    *count = (unsigned short)program.count;
    return program.end;
}
