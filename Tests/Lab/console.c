// SPDX-License-Identifier: Apache-2.0
// console [OPTION…] COMMAND…: runs an emulator for Tests/Lab/run.
//
// Prints the emulator's standard output and standard error line by line without escape sequences; long lines are truncated. The whole output goes to
// --log. The status is the emulator's, 128 and more for a signal, and 124 if it was ended because it hung.
//
// It hangs when a number of seconds has passed, whatever it has written meanwhile: --boot from its start; N and --silence from the last line
// `# begin NAME limit N`; the half of --silence from `1..N`; all of them times --slowness. A second is one that the emulator had a CPU for or slept
// through. One in which it waited for a CPU, for a disk of the machine, or was stopped, does not count: on a busy machine a limit is as far away as on an
// idle one.
// With --clock the emulator gets each such second's number, and a newline, on its standard input, from the first `# begin` on.
//
// The emulator does not outlive this program, nor this program its parent, however they end. --parent PID names the parent, which may have ended before
// this program starts. SIGUSR1 ends both programs, and so do SIGTERM, SIGINT and SIGHUP unless they are ignored. The emulator is in a process group of its
// own, which ends as a whole; with --terminal it is in this one, has the terminal, and nothing but that is done for it.
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { SAMPLE = 250 /* ms */, LONGEST = 4000 /* bytes of a line */, THREADS = 256, HUNG = 124 };

static long boot = 90, silence = 60, slowness = 1;
static bool with_clock, with_terminal;
static FILE *the_log;
static pid_t emulator;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

// MARK: Start and end

static void end_emulator(void) {
    if (emulator > 0) kill(with_terminal ? emulator : -emulator, SIGKILL);
}

// The terminal was closed, or Tests/Lab/run ended or was interrupted.
static void give_up(int number) {
    end_emulator();
    _exit(128 + number);
}

// Has the kernel send `number` to this process when `parent` ends, which may have happened already.
static void tie_to(pid_t parent, int number) {
    if (prctl(PR_SET_PDEATHSIG, number) != 0) fail("prctl");
    if (getppid() != parent) _exit(1);
}

// Starts it; its ends of the two pipes become `*input`, or -1, and `*output`.
static void start_emulator(char **command, int *input, int *output) {
    int in[2], out[2];
    if (pipe2(in, O_CLOEXEC) != 0 || pipe2(out, O_CLOEXEC) != 0) fail("pipe");
    pid_t parent = getpid();
    emulator = fork();
    if (emulator < 0) fail("fork");
    if (emulator == 0) {
        tie_to(parent, SIGKILL);
        signal(SIGPIPE, SIG_DFL);
        if (!with_terminal) {
            setpgid(0, 0);
            int nothing = open("/dev/null", O_RDWR | O_CLOEXEC);
            if (dup2(with_clock ? in[0] : nothing, 0) < 0 || dup2(out[1], 1) < 0 || dup2(out[1], 2) < 0) fail("dup2");
        }
        execvp(command[0], command);
        fprintf(stderr, "%s: %s\n", command[0], strerror(errno));
        _exit(127);
    }
    if (!with_terminal) setpgid(emulator, emulator);
    close(in[0]);
    close(out[1]);
    if (!with_clock) {
        close(in[1]);
        in[1] = -1;
    } else {
        fcntl(in[1], F_SETFL, O_NONBLOCK);
    }
    fcntl(out[0], F_SETFL, O_NONBLOCK);
    *input = in[1];
    *output = out[0];
}

// MARK: The clock

// The CPU time of one thread, in ticks of the kernel.
struct thread {
    pid_t id;
    unsigned long time;
};

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

// Reads a thread's state and CPU time (proc(5): fields 3, 14 and 15 of stat, behind a name in parentheses, which may contain anything).
static bool read_thread(pid_t id, char *state, unsigned long *time) {
    char path[64], line[1024];
    snprintf(path, sizeof path, "/proc/%d/task/%d/stat", emulator, id);
    FILE *file = fopen(path, "re");
    if (!file) return false;
    size_t count = fread(line, 1, sizeof line - 1, file);
    fclose(file);
    line[count] = 0;
    char *rest = strrchr(line, ')');
    unsigned long user, system;
    if (!rest || sscanf(rest + 1, " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", state, &user, &system) != 3) return false;
    *time = user + system;
    return true;
}

// How many of the `passed` seconds since the last call count: all if every thread slept; otherwise the CPU time of the busiest thread, since the others may
// wait for it.
static double counted(double passed) {
    static struct thread before[THREADS];
    static size_t known;
    struct thread now[THREADS];
    size_t count = 0;
    bool waits = false;
    unsigned long most = 0;
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/task", emulator);
    DIR *directory = opendir(path);
    if (!directory) return 0;
    for (struct dirent *entry; (entry = readdir(directory)) && count < THREADS;) {
        char state;
        unsigned long time, last = 0;
        pid_t id = atoi(entry->d_name);
        if (id <= 0 || !read_thread(id, &state, &time)) continue;
        if (state != 'S' && state != 'I') waits = true;
        for (size_t i = 0; i < known; i++) {
            if (before[i].id == id) last = before[i].time;
        }
        if (time > last && time - last > most) most = time - last;
        now[count++] = (struct thread){ id, time };
    }
    closedir(directory);
    memcpy(before, now, count * sizeof *now);
    known = count;
    double busy = (double)most / sysconf(_SC_CLK_TCK);
    return !waits || busy > passed ? passed : busy;
}

// MARK: The lines

static char line[LONGEST];
static size_t length, lost;
// Counted seconds so far, and those after which the emulator hangs.
static double counter, deadline;
// The first case has begun.
static bool began;

static void end_line(void) {
    long limit;
    printf("%.*s", (int)length, line);
    if (lost) printf(" [and %zu bytes more]", lost);
    putchar('\n');
    fflush(stdout);
    putc('\n', the_log);
    fflush(the_log);
    line[length < LONGEST ? length : LONGEST - 1] = 0;
    if (sscanf(line, "# begin %*s limit %ld", &limit) == 1) {
        deadline = counter + slowness * (limit + silence);
        began = true;
    }
    if (strncmp(line, "1..", 3) == 0) deadline = counter + slowness * silence / 2.0;
    length = lost = 0;
}

// One byte of the output. Escape sequences (ECMA-48 §5.3 and 5.4: ESC and a byte, ESC [ to a byte from @ on, ESC ( and a byte, ESC ] to BEL or ESC \) and
// control characters are left out.
static void take(unsigned char byte) {
    static enum { TEXT, ESCAPE, SEQUENCE, CHARSET, COMMAND } where = TEXT;
    // Within a sequence these end it: a line that ends there is a line still.
    if (byte == '\n') {
        where = TEXT;
        return end_line();
    }
    if (byte == 0x1b) {
        where = ESCAPE;
        return;
    }
    switch (where) {
    case TEXT:
        if (byte < ' ' && byte != '\t') return;
        putc(byte, the_log);
        if (length < LONGEST) line[length++] = byte;
        else lost++;
        return;
    case ESCAPE:
        where = byte == '[' ? SEQUENCE : byte == ']' ? COMMAND : byte == '(' || byte == ')' ? CHARSET : TEXT;
        return;
    case SEQUENCE:
        if (byte >= '@' && byte <= '~') where = TEXT;
        return;
    case CHARSET:
        where = TEXT;
        return;
    case COMMAND:
        if (byte == 7) where = TEXT;
        return;
    }
}

// Takes at most what a pipe holds, since more may come for ever; false when nothing will come any more.
static bool take_some(int output) {
    unsigned char bytes[65536];
    ssize_t count = read(output, bytes, sizeof bytes);
    for (ssize_t i = 0; i < count; i++) take(bytes[i]);
    return count > 0 || (count < 0 && (errno == EAGAIN || errno == EINTR));
}

// Ends a last line without a newline, such as a prompt.
static void end_output(void) {
    if (length || lost) end_line();
}

// Runs until the emulator ends, and returns its status from waitpid, or -1 if it hung.
static int serve(int input, int output) {
    double last = seconds();
    long told = 0;
    bool open = true;
    deadline = slowness * boot;
    for (;;) {
        struct pollfd ready = { open ? output : -1, POLLIN, 0 };
        // Samples have their own times: at that of output, the thread that wrote it still runs, and what it slept before would not count.
        double rest = last + SAMPLE / 1e3 - seconds();
        poll(&ready, 1, rest > 0 ? rest * 1e3 + 1 : 0);
        int status;
        // Checked before the last output is read.
        bool ended = waitpid(emulator, &status, WNOHANG) == emulator;
        double now = seconds();
        if (now - last >= SAMPLE / 1e3) {
            counter += counted(now - last);
            if (!began) told = counter;
            last = now;
        }
        // After the count: these seconds are not part of a limit that begins now.
        if (open) open = take_some(output);
        if (ended) {
            end_emulator();
            end_output();
            return status;
        }
        if (counter > deadline) {
            end_emulator();
            waitpid(emulator, &status, 0);
            if (open) take_some(output);
            end_output();
            return -1;
        }
        // If the host does not read, the pipe is full, and the number is dropped.
        while (input >= 0 && told < (long)counter) {
            char text[32];
            int size = snprintf(text, sizeof text, "%ld\n", ++told);
            if (write(input, text, size) < 0 && errno == EPIPE) input = -1;
        }
    }
}

int main(int count, char **arguments) {
    static const struct option options[] = {
        { "log", required_argument, 0, 'l' },     { "boot", required_argument, 0, 'b' }, { "silence", required_argument, 0, 's' },
        { "slowness", required_argument, 0, 'n' }, { "parent", required_argument, 0, 'p' }, { "clock", no_argument, 0, 'c' },
        { "terminal", no_argument, 0, 't' },
        { 0, 0, 0, 0 },
    };
    pid_t parent = getppid();
    const char *log_path = "/dev/null";
    for (int option; (option = getopt_long(count, arguments, "+", options, NULL)) != -1;) {
        switch (option) {
        case 'l': log_path = optarg; break;
        case 'b': boot = atol(optarg); break;
        case 's': silence = atol(optarg); break;
        case 'n': slowness = atol(optarg); break;
        case 'p': parent = atol(optarg); break;
        case 'c': with_clock = true; break;
        case 't': with_terminal = true; break;
        default: return 64;
        }
    }
    if (optind == count) {
        fprintf(stderr, "usage: console [--log FILE] [--boot SECONDS] [--silence SECONDS] [--slowness N] [--parent PID] [--clock] [--terminal] COMMAND…\n");
        return 64;
    }
    the_log = fopen(log_path, "ae");
    if (!the_log) fail(log_path);
    // Signals that were ignored at the start, as SIGHUP is under nohup, stay ignored.
    for (size_t i = 0; i < 3; i++) {
        int number = (const int[]){ SIGTERM, SIGINT, SIGHUP }[i];
        if (signal(number, SIG_IGN) != SIG_IGN) signal(number, give_up);
    }
    signal(SIGPIPE, SIG_IGN);
    // The signal of the parent's end is never ignored or blocked.
    sigset_t ending;
    sigemptyset(&ending);
    sigaddset(&ending, SIGUSR1);
    signal(SIGUSR1, give_up);
    sigprocmask(SIG_UNBLOCK, &ending, NULL);
    tie_to(parent, SIGUSR1);
    int input, output, status;
    start_emulator(arguments + optind, &input, &output);
    if (with_terminal) {
        while (waitpid(emulator, &status, 0) < 0) {}
    } else {
        status = serve(input, output);
        if (status == -1) return HUNG;
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
