// SPDX-License-Identifier: Apache-2.0
// What has to happen before the Swift runtime's own start, which reads files of /proc: the program also runs where /proc is not mounted.
#include "CLinux.h"

/// The standard library's way to be given the arguments, which it reads from /proc/self/cmdline otherwise.
void _swift_stdlib_overrideUnsafeArgvArgc(char **argv, int argc) __attribute__((weak));

// The C library passes constructors what main gets. This one comes before those without a priority, which the runtime's are.
__attribute__((constructor(101))) static void start(int argc, char **argv) {
    if (argc > 0 && argv && _swift_stdlib_overrideUnsafeArgvArgc) _swift_stdlib_overrideUnsafeArgvArgc(argv, argc);
    // In a static program the runtime looks for itself, to find the program that prints backtraces, and aborts when it does not.
    if (access("/proc/self/exe", F_OK) != 0) setenv("SWIFT_BACKTRACE", "enable=no,swift-backtrace=/", 1);
}
