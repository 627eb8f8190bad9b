// SPDX-License-Identifier: Apache-2.0

#define _GNU_SOURCE
#include "network.h"
#include "common.h"
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { TCP_PORT = 5001, UDP_PORT = 5002, CHUNK = 128 << 10, PACKET = 64, BURST = 32 };

/// The first byte of a connection or packet: the request to the host.
enum Order { TAKE = 'T', GIVE = 'G', ECHO = 'E', COUNT = 'C', BURST_BACK = 'B' };

static uint8_t chunk[CHUNK];

static struct sockaddr_in address(const char *host, int port) {
    struct sockaddr_in result = {.sin_family = AF_INET, .sin_port = htons(port)};
    inet_pton(AF_INET, host, &result.sin_addr);
    return result;
}

static int connection(const char *host, enum Order order) {
    struct sockaddr_in peer = address(host, TCP_PORT);
    int s = check(socket(AF_INET, SOCK_STREAM, 0), "socket");
    check(connect(s, (struct sockaddr *)&peer, sizeof peer), "connect");
    uint8_t byte = order;
    check(write(s, &byte, 1), "write");
    return s;
}

// MARK: The host's side

static void serve_connection(int s) {
    uint8_t order = 0;
    if (read(s, &order, 1) != 1) return;
    if (order == GIVE) while (write(s, chunk, CHUNK) > 0) {}
    // The guest's clock runs until the last byte has been read here, and the connection is closed.
    if (order == TAKE) while (read(s, chunk, CHUNK) > 0) {}
    // One byte each way.
    int one = 1;
    setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (order == ECHO) while (read(s, chunk, 1) == 1 && write(s, chunk, 1) == 1) {}
}

static void serve_packets(void) {
    struct sockaddr_in own = address("0.0.0.0", UDP_PORT), from;
    int s = check(socket(AF_INET, SOCK_DGRAM, 0), "socket");
    check(bind(s, (struct sockaddr *)&own, sizeof own), "bind");
    for (;;) {
        uint8_t packet[PACKET];
        socklen_t length = sizeof from;
        if (recvfrom(s, packet, PACKET, 0, (struct sockaddr *)&from, &length) < 2) continue;
        // Of a burst that is counted, the last is answered: they do not overtake each other.
        int answers = packet[0] == BURST_BACK ? BURST : packet[0] == COUNT && packet[1] == BURST - 1 ? 1 : 0;
        for (int i = 0; i < answers; i++) sendto(s, packet, PACKET, 0, (struct sockaddr *)&from, length);
    }
}

/// Creates a persistent TAP, for monitors without the right to create one.
static void make_tap(const char *name) {
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    int tun = check(open("/dev/net/tun", O_RDWR), "/dev/net/tun");
    check(ioctl(tun, TUNSETIFF, &request), name);
    check(ioctl(tun, TUNSETPERSIST, 1), name);
    close(tun);
}

void serve_network(void) {
    make_tap("tap0");
    signal(SIGPIPE, SIG_IGN);
    signal(SIGCHLD, SIG_IGN);
    if (fork() == 0) serve_packets();
    struct sockaddr_in own = address("0.0.0.0", TCP_PORT);
    int one = 1, listener = check(socket(AF_INET, SOCK_STREAM, 0), "socket");
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    check(bind(listener, (struct sockaddr *)&own, sizeof own), "bind");
    check(listen(listener, 8), "listen");
    for (;;) {
        int s = accept(listener, NULL, NULL);
        if (s < 0) continue;
        if (fork() == 0) {
            serve_connection(s);
            _exit(0);
        }
        close(s);
    }
}

// MARK: The guest's side

static void stream_out(const char *host, double seconds) {
    int s = connection(host, TAKE);
    double began = now();
    uint64_t bytes = 0;
    while (now() - began < seconds) bytes += check(write(s, chunk, CHUNK), "write");
    shutdown(s, SHUT_WR);
    check(read(s, chunk, 1) == 0 ? 0 : -1, "end of the connection");
    report("tcp-out", bytes / (now() - began));
    close(s);
}

static void stream_in(const char *host, double seconds) {
    int s = connection(host, GIVE);
    double began = now(), time;
    uint64_t bytes = 0;
    do bytes += check(read(s, chunk, CHUNK), "read"); while ((time = now() - began) < seconds);
    report("tcp-in", bytes / time);
    close(s);
}

static void turns(const char *host, double seconds) {
    int s = connection(host, ECHO), one = 1;
    setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    double began = now(), time;
    uint64_t count = 0;
    do {
        check(write(s, chunk, 1), "write");
        check(read(s, chunk, 1) == 1 ? 0 : -1, "echo");
        count++;
    } while ((time = now() - began) < seconds);
    report("tcp-turns", count / time);
    close(s);
}

/// Sends bursts of small packets, whose last one is answered; or one packet, answered by a burst. Of a burst that loses a packet only the time counts.
static void packets(const char *name, const char *host, enum Order order, double seconds) {
    struct sockaddr_in peer = address(host, UDP_PORT);
    int s = check(socket(AF_INET, SOCK_DGRAM, 0), "socket");
    check(connect(s, (struct sockaddr *)&peer, sizeof peer), "connect");
    int out = order == COUNT ? BURST : 1, in = order == COUNT ? 1 : BURST;
    double began = now(), time;
    uint64_t count = 0, lost = 0;
    do {
        uint8_t packet[PACKET] = {order};
        for (int i = 0; i < out; i++) {
            packet[1] = i;
            check(send(s, packet, PACKET, 0), "send");
        }
        int arrived = 0;
        struct pollfd wait = {.fd = s, .events = POLLIN};
        while (arrived < in && poll(&wait, 1, 200) > 0) arrived += recv(s, packet, PACKET, 0) == PACKET;
        if (arrived == in) count += BURST; else lost++;
    } while ((time = now() - began) < seconds);
    report(name, count / time);
    if (lost) printf("lab: lost %s %llu\n", name, (unsigned long long)lost);
    close(s);
}

/// Brings eth0 up with 192.0.2.2/24, and waits for the host's answer to the first packet.
static void bring_up(const char *host) {
    int s = check(socket(AF_INET, SOCK_DGRAM, 0), "socket");
    struct ifreq request = {.ifr_name = "eth0"};
    struct sockaddr_in own = address("192.0.2.2", 0), mask = address("255.255.255.0", 0);
    memcpy(&request.ifr_addr, &own, sizeof own);
    check(ioctl(s, SIOCSIFADDR, &request), "eth0's address");
    memcpy(&request.ifr_netmask, &mask, sizeof mask);
    check(ioctl(s, SIOCSIFNETMASK, &request), "eth0's mask");
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    check(ioctl(s, SIOCSIFFLAGS, &request), "eth0 up");
    struct sockaddr_in peer = address(host, UDP_PORT);
    check(connect(s, (struct sockaddr *)&peer, sizeof peer), "connect");
    for (int tries = 0; tries < 50; tries++) {
        uint8_t packet[PACKET] = {COUNT, BURST - 1};
        struct pollfd wait = {.fd = s, .events = POLLIN};
        if (send(s, packet, PACKET, 0) == PACKET && poll(&wait, 1, 200) > 0 && recv(s, packet, PACKET, 0) == PACKET) {
            close(s);
            return;
        }
    }
    errno = ETIMEDOUT;
    check(-1, "an answer of the host");
}

void measure_network(const char *host, double seconds) {
    bring_up(host);
    stream_out(host, seconds);
    stream_in(host, seconds);
    turns(host, seconds);
    packets("packets-out", host, COUNT, seconds);
    packets("packets-in", host, BURST_BACK, seconds);
}
