// SPDX-License-Identifier: Apache-2.0
// One byte there and back over TCP or UDP.
//   echoes serve PORT                   answers on both, until it is killed
//   echoes tcp|udp ADDRESS PORT SECONDS   prints round trips per second, and percentiles of their time in µs
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 4000000 };

static int check(int result, const char *what) {
    if (result < 0) {
        fprintf(stderr, "echoes: %s: %s\n", what, strerror(errno));
        exit(1);
    }
    return result;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

static int bound(int type, int port) {
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_port = htons(port)};
    int one = 1, line = check(socket(AF_INET, type, 0), "socket");
    setsockopt(line, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    check(bind(line, (struct sockaddr *)&own, sizeof own), "bind");
    return line;
}

static _Noreturn void serve(int port) {
    int one = 1, udp = bound(SOCK_DGRAM, port), listener = bound(SOCK_STREAM, port), tcp = -1;
    char byte;
    check(listen(listener, 1), "listen");
    puts("ready");
    fflush(stdout);
    for (;;) {
        struct pollfd lines[] = {{udp, POLLIN, 0}, {listener, POLLIN, 0}, {tcp, POLLIN, 0}};
        check(poll(lines, 3, -1), "poll");
        if (lines[0].revents) {
            struct sockaddr_in peer;
            socklen_t length = sizeof peer;
            ssize_t size = recvfrom(udp, &byte, 1, 0, (struct sockaddr *)&peer, &length);
            if (size >= 0) sendto(udp, &byte, size, 0, (struct sockaddr *)&peer, length);
        }
        if (lines[1].revents) {
            if (tcp >= 0) close(tcp);
            tcp = check(accept(listener, NULL, NULL), "accept");
            setsockopt(tcp, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        } else if (lines[2].revents && (read(tcp, &byte, 1) != 1 || write(tcp, &byte, 1) != 1)) {
            close(tcp);
            tcp = -1;
        }
    }
}

static int ascending(const void *first, const void *second) {
    float a = *(const float *)first, b = *(const float *)second;
    return (a > b) - (a < b);
}

int main(int count, char **words) {
    if (count == 3 && strcmp(words[1], "serve") == 0) serve(atoi(words[2]));
    if (count != 5) return fprintf(stderr, "usage: echoes serve PORT | tcp|udp ADDRESS PORT SECONDS\n"), 2;
    int is_udp = strcmp(words[1], "udp") == 0, one = 1;
    struct sockaddr_in peer = {.sin_family = AF_INET, .sin_port = htons(atoi(words[3]))};
    if (inet_pton(AF_INET, words[2], &peer.sin_addr) != 1) return fprintf(stderr, "echoes: %s is no address\n", words[2]), 2;
    int line = check(socket(AF_INET, is_udp ? SOCK_DGRAM : SOCK_STREAM, 0), "socket");
    check(connect(line, (struct sockaddr *)&peer, sizeof peer), "connect");
    if (!is_udp) check(setsockopt(line, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one), "TCP_NODELAY");
    struct timeval limit = {.tv_sec = 5};
    setsockopt(line, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    float *times = malloc(MOST * sizeof *times);
    int done = 0;
    char byte = 'x';
    // The first tenth of a second is not counted.
    double began = now(), counted = began + 0.1, end = counted + atof(words[4]), before = began;
    while (before < end && done < MOST) {
        check(send(line, &byte, 1, 0), "send");
        check(recv(line, &byte, 1, 0), "recv");
        double after = now();
        if (before >= counted) times[done++] = (after - before) * 1e6;
        before = after;
    }
    if (done == 0) return fprintf(stderr, "echoes: no round trip\n"), 1;
    double sum = 0;
    for (int i = 0; i < done; i++) sum += times[i];
    qsort(times, done, sizeof *times, ascending);
    printf("rate %.1f\np50 %.2f\np99 %.2f\np99.9 %.2f\n", done / (sum * 1e-6), times[done / 2], times[(int)(done * 0.99)], times[(int)(done * 0.999)]);
    return 0;
}
