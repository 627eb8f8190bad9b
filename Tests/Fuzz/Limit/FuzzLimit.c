// SPDX-License-Identifier: Apache-2.0

#include "CFuzzLimit.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <unistd.h>

static volatile sig_atomic_t limit, taken, is_running;

// One more second of CPU time has been taken, by all threads together.
static void count_second(int number) {
    (void)number;
    if (!is_running || ++taken < limit) return;
    static const char text[] = "==swkvm-fuzz== the input takes too much CPU time (fuzz_limit)\n";
    ssize_t written = write(STDERR_FILENO, text, sizeof text - 1);
    (void)written;
    // libFuzzer's handler prints the stack, and keeps the input.
    abort();
}

void fuzz_limit(unsigned seconds) {
    limit = (sig_atomic_t)seconds;
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = count_second;
    action.sa_flags = SA_RESTART;
    struct itimerval timer = {.it_interval = {.tv_sec = 1}, .it_value = {.tv_sec = 1}};
    if (sigaction(SIGPROF, &action, NULL) == 0 && setitimer(ITIMER_PROF, &timer, NULL) == 0) return;
    perror("swkvm-fuzz: no timer of CPU time");
    exit(71);
}

void fuzz_limit_begin(void) {
    taken = 0;
    is_running = 1;
}

void fuzz_limit_end(void) { is_running = 0; }
