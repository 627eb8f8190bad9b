// SPDX-License-Identifier: Apache-2.0
// What an attacker in the process would try, call by call.
#ifndef CSANDBOX_TEST_H
#define CSANDBOX_TEST_H

#include <linux/filter.h>

extern const int csandbox_attempt_count;
const char *csandbox_attempt_name(int index);

/// Makes all attempts in a thread of its own, with the filter of `count` instructions if `code` is not null. Each result is 0 if the attempt
/// succeeded, otherwise errno; -1 if it was not made, as those are that only a filter makes harmless. Returns 0, or an errno value if there was no thread or no filter.
int csandbox_attempt_all(const struct sock_filter *code, unsigned short count, int *results);

/// A child process with a filter, and with SIGSYS reported as `csandbox_report` says, makes a call that is in no list (getppid). `output` gets what it
/// writes to standard error. Returns its wait status; it exits with 7 if the call was made.
int csandbox_refused_in_child(const struct sock_filter *code, unsigned short count, int exit_status, char *output, int size);

/// A child process that reports faults (`csandbox_report_faults`, status 70) has one: 0 ud2, 1 int3, 2 a write to address 8, 3 abort, 4 a used-up stack,
/// 5 ud2 where the frames lead to an unmapped address. `output` gets what it writes to standard error. Returns its wait status.
int csandbox_fault_in_child(int kind, char *output, int size);

// The same in a thread of another process, which has to do nothing for it.

extern const int hostile_attempt_count;
const char *hostile_attempt_name(int index);
/// Whether the kernel refuses it also without a sandbox, for another reason: it would do harm.
int hostile_attempt_is_only_begun(int index);

/// Results that are no answer of the kernel's to a call: a filter sent SIGSYS; the thread has ended.
enum { HOSTILE_REFUSED = -5000, HOSTILE_LOST = -5001 };

/// Has a thread that waits in a system call make all of them, then go on with its own. It needs the right to trace the process.
/// `other` is a process of the caller's; `directory` has files `secret`, `image`, `removed` and `renamed`, and nothing else.
/// Each result is what the kernel answered (an errno value is negative). Returns 0 or an errno value.
int hostile_attempt_all(int thread, int other, const char *directory, long *results);

/// Has a thread go on at an address. It needs the right to trace the process. Returns 0 or an errno value.
int hostile_jump(int thread, unsigned long address);

#endif
