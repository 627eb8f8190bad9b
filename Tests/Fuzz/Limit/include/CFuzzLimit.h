// SPDX-License-Identifier: Apache-2.0
#ifndef CFUZZLIMIT_H
#define CFUZZLIMIT_H

/// Ends the process, as a failed assertion does, when an input takes so many seconds of CPU time, give or take one: a busy
/// machine is no reason. Called once, before the first input.
void fuzz_limit(unsigned seconds);

/// An input's work begins, and ends.
void fuzz_limit_begin(void);
void fuzz_limit_end(void);

#endif
