// SPDX-License-Identifier: Apache-2.0
// race SECONDS WORD FILE COMMAND…: starts a monitor and watches its guest's console, which is the command's standard output.
// Prints `NANOSECONDS LINE` for each line of the guest's that begins with `lab: `, with the time from just before exec to the line's
// end, as it arrives, and copies all of the console to FILE. Kills the command when the guest has printed `lab: WORD`; status 1 if it prints
// `lab: FAILED`, or nothing for SECONDS.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static long long now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ll + time.tv_nsec;
}

static void fail(const char *what) {
    fprintf(stderr, "race: %s: %s\n", what, strerror(errno));
    exit(2);
}

int main(int count, char **words) {
    if (count < 5) return fprintf(stderr, "race SECONDS WORD FILE COMMAND…\n"), 2;
    long long limit = atoll(words[1]) * 1000000000ll;
    const char *wanted = words[2];
    int copy = open(words[3], O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644), console[2];
    if (copy < 0) fail(words[3]);
    if (pipe2(console, O_CLOEXEC) < 0) fail("pipe");
    long long began = now();
    pid_t child = fork();
    if (child < 0) fail("fork");
    if (child == 0) {
        int nothing = open("/dev/null", O_RDONLY);
        dup2(nothing, 0);
        dup2(console[1], 1);
        execvp(words[4], words + 4);
        fail(words[4]);
    }
    close(console[1]);

    char line[1024];
    size_t length = 0;
    int found = 0;
    while (!found) {
        long long left = began + limit - now();
        struct pollfd wait = {.fd = console[0], .events = POLLIN};
        char bytes[4096];
        if (left <= 0 || poll(&wait, 1, (int)(left / 1000000) + 1) <= 0) break;
        ssize_t taken = read(console[0], bytes, sizeof bytes);
        long long time = now() - began;
        if (taken <= 0) break;
        if (write(copy, bytes, taken) != taken) fail(words[3]);
        for (ssize_t i = 0; i < taken && !found; i++) {
            if (bytes[i] != '\n') {
                if (bytes[i] != '\r' && length < sizeof line - 1) line[length++] = bytes[i];
                continue;
            }
            line[length] = 0;
            length = 0;
            if (strncmp(line, "lab: ", 5) != 0) continue;
            printf("%lld %s\n", time, line + 5);
            size_t word = strcspn(line + 5, " ");
            found = word == strlen(wanted) && strncmp(line + 5, wanted, word) == 0;
            if (strncmp(line + 5, "FAILED", 6) == 0) limit = 0;
        }
    }
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    return found ? 0 : 1;
}
