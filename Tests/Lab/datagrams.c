// SPDX-License-Identifier: Apache-2.0
// UDP for the lab, whose busybox has none: the same program in the emulated host and in guests.
//   datagrams echo PORT                 echoes datagrams, until one of one byte
//   datagrams send ADDRESS PORT COUNT   sends COUNT numbered datagrams of 8 to 1472 bytes, at most 32 of them in flight; each has to come back
//                                       unchanged. Then one of one byte. Status 0 if none was lost or altered
#include <arpa/inet.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum { window = 32, largest = 1472 };

static void fill(uint32_t number, unsigned char *bytes, size_t size) {
    for (size_t i = 0; i < size; i++) bytes[i] = (unsigned char)(number * 31 + i);
    memcpy(bytes, &number, sizeof number);
}

// Sizes vary, with more small ones.
static size_t size_of(uint32_t number) { return number % 4 ? 8 + number % 57 : 8 + number * 97 % (largest - 7); }

static int echo(int port) {
    unsigned char bytes[largest + 1];
    int sock = socket(AF_INET, SOCK_DGRAM, 0);
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_port = htons(port)}, peer;
    if (bind(sock, (struct sockaddr *)&own, sizeof own) != 0) return perror("bind"), 1;
    for (unsigned long count = 0;; count++) {
        socklen_t length = sizeof peer;
        ssize_t size = recvfrom(sock, bytes, sizeof bytes, 0, (struct sockaddr *)&peer, &length);
        if (size < 0) return perror("recvfrom"), 1;
        if (size == 1) return printf("%lu datagrams\n", count), 0;
        if (sendto(sock, bytes, size, 0, (struct sockaddr *)&peer, length) != size) return perror("sendto"), 1;
    }
}

static int transmit(const char *address, int port, uint32_t count) {
    unsigned char bytes[largest + 1], wanted[largest];
    int sock = socket(AF_INET, SOCK_DGRAM, 0);
    struct sockaddr_in peer = {.sin_family = AF_INET, .sin_port = htons(port)};
    if (inet_pton(AF_INET, address, &peer.sin_addr) != 1 || connect(sock, (struct sockaddr *)&peer, sizeof peer) != 0) return perror(address), 1;
    unsigned char *back = calloc(count, 1);
    uint32_t sent = 0, received = 0;
    while (received < count) {
        while (sent < count && sent - received < window) {
            fill(sent, bytes, size_of(sent));
            if (send(sock, bytes, size_of(sent), 0) < 0) return perror("send"), 1;
            sent++;
        }
        struct pollfd ready = {.fd = sock, .events = POLLIN};
        // Long, since the machine may be busy.
        if (poll(&ready, 1, 120000) != 1) return printf("%u of %u datagrams came back\n", received, sent), 1;
        ssize_t size = recv(sock, bytes, sizeof bytes, 0);
        if (size < 0) return perror("recv"), 1;
        uint32_t number = 0;
        if (size >= 4) memcpy(&number, bytes, sizeof number);
        if (size < 8 || number >= sent || back[number]++ || (size_t)size != size_of(number)) return printf("a datagram of %zd bytes nobody sent\n", size), 1;
        fill(number, wanted, size);
        if (memcmp(bytes, wanted, size) != 0) return printf("datagram %u of %zd bytes was altered\n", number, size), 1;
        received++;
    }
    if (send(sock, "", 1, 0) != 1) return perror("send"), 1;
    return printf("%u datagrams there and back\n", received), 0;
}

int main(int count, char **words) {
    if (count == 3 && strcmp(words[1], "echo") == 0) return echo(atoi(words[2]));
    if (count == 5 && strcmp(words[1], "send") == 0) return transmit(words[2], atoi(words[3]), strtoul(words[4], NULL, 10));
    fputs("usage: datagrams echo PORT | send ADDRESS PORT COUNT\n", stderr);
    return 64;
}
