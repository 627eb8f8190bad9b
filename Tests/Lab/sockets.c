// SPDX-License-Identifier: Apache-2.0
// Stream sockets for the lab, whose busybox has no AF_VSOCK: the same program in the emulated host and in guests.
//   sockets serve vsock:PORT|PATH COUNT        accepts COUNT connections at a time of a guest's port, or of a UNIX socket, and sends back what comes
//   sockets call vsock:PORT|PATH[:PORT] MIB    connects to a port of the host (CID 2), or to a UNIX socket, with `CONNECT PORT` first if there is one;
//                                              sends MIB MiB, closes that direction, and reads them back at the same time. Status 0 if they are the same
//   sockets pings vsock:PORT|PATH[:PORT] COUNT sends a byte COUNT times, and waits for it each time
#include <errno.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

static int wrong(const char *what) { return perror(what), exit(1), 1; }

/// A socket, and its address, with PATH cut before the colon; returns the port behind it, or 0.
static unsigned place(char *text, int *number, struct sockaddr_storage *address, socklen_t *length, unsigned cid) {
    memset(address, 0, sizeof *address);
    if (strncmp(text, "vsock:", 6) == 0) {
        struct sockaddr_vm *own = (struct sockaddr_vm *)address;
        own->svm_family = AF_VSOCK, own->svm_cid = cid, own->svm_port = (unsigned)atoi(text + 6);
        *length = sizeof *own;
        *number = socket(AF_VSOCK, SOCK_STREAM, 0);
        if (*number < 0) wrong("socket");
        return 0;
    }
    struct sockaddr_un *own = (struct sockaddr_un *)address;
    char *colon = strchr(text, ':');
    if (colon) *colon = 0;
    own->sun_family = AF_UNIX;
    strncpy(own->sun_path, text, sizeof own->sun_path - 1);
    *length = sizeof *own;
    *number = socket(AF_UNIX, SOCK_STREAM, 0);
    if (*number < 0) wrong("socket");
    return colon ? (unsigned)atoi(colon + 1) : 0;
}

static int echo(int peer) {
    static unsigned char bytes[65536];
    ssize_t count;
    while ((count = read(peer, bytes, sizeof bytes)) > 0)
        for (ssize_t done = 0, more; done < count; done += more)
            if ((more = write(peer, bytes + done, (size_t)(count - done))) <= 0) return perror("write"), 1;
    if (count < 0) return perror("read"), 1;
    // The other end closes when it has all.
    shutdown(peer, SHUT_WR);
    return 0;
}

static int serve(char *text, int count) {
    int listener, status, worst = 0;
    struct sockaddr_storage address;
    socklen_t length;
    place(text, &listener, &address, &length, VMADDR_CID_ANY);
    if (address.ss_family == AF_UNIX) unlink(text);
    if (bind(listener, (struct sockaddr *)&address, length) != 0) wrong("bind");
    if (listen(listener, 16) != 0) wrong("listen");
    printf("listening\n"), fflush(stdout);
    for (int i = 0; i < count; i++) {
        int peer = accept(listener, 0, 0);
        if (peer < 0) wrong("accept");
        if (fork() == 0) _exit(echo(peer));
        close(peer);
    }
    while (wait(&status) > 0) worst |= status;
    printf("served %d\n", count);
    return worst != 0;
}

static int connected(char *text) {
    int peer;
    struct sockaddr_storage address;
    socklen_t length;
    unsigned port = place(text, &peer, &address, &length, VMADDR_CID_HOST);
    if (connect(peer, (struct sockaddr *)&address, length) != 0) wrong("connect");
    if (port) {
        char line[64] = "";
        size_t size = (size_t)snprintf(line, sizeof line, "CONNECT %u\n", port);
        if (write(peer, line, size) != (ssize_t)size) wrong("write");
        for (size = 0; size < sizeof line - 1; size++)
            if (read(peer, line + size, 1) != 1) wrong("no answer");
            else if (line[size] == '\n') break;
        if (strncmp(line, "OK ", 3) != 0) return fprintf(stderr, "the answer is %s", line), exit(1), 1;
    }
    return peer;
}

static unsigned char byte_at(uint64_t offset) { return (unsigned char)((offset * 0x9e3779b97f4a7c15) >> 56); }

static int call(char *text, uint64_t size) {
    static unsigned char out[65536], in[65536];
    int peer = connected(text);
    uint64_t sent = 0, received = 0;
    for (;;) {
        struct pollfd ready = {peer, POLLIN | (sent < size ? POLLOUT : 0), 0};
        if (poll(&ready, 1, -1) < 0) wrong("poll");
        if (ready.revents & POLLOUT) {
            size_t count = size - sent < sizeof out ? (size_t)(size - sent) : sizeof out;
            for (size_t i = 0; i < count; i++) out[i] = byte_at(sent + i);
            ssize_t done = send(peer, out, count, MSG_DONTWAIT | MSG_NOSIGNAL);
            if (done < 0 && errno != EAGAIN) wrong("send");
            if (done > 0 && (sent += (uint64_t)done) == size) shutdown(peer, SHUT_WR);
        }
        if (ready.revents & ~POLLOUT) {
            ssize_t count = recv(peer, in, sizeof in, MSG_DONTWAIT);
            if (count < 0 && errno == EAGAIN) continue;
            if (count < 0) wrong("recv");
            if (count == 0) break;
            for (ssize_t i = 0; i < count; i++)
                if (in[i] != byte_at(received + (uint64_t)i)) return printf("byte %llu is another one\n", (unsigned long long)received), 1;
            received += (uint64_t)count;
        }
    }
    printf("%llu bytes sent, %llu came back\n", (unsigned long long)sent, (unsigned long long)received);
    return received != size;
}

static int pings(char *text, int count) {
    int peer = connected(text);
    unsigned char byte;
    for (int i = 0; i < count; i++) {
        unsigned char sent = (unsigned char)i;
        if (write(peer, &sent, 1) != 1 || read(peer, &byte, 1) != 1 || byte != sent) wrong("ping");
    }
    printf("%d bytes there and back\n", count);
    return 0;
}

int main(int count, char **words) {
    signal(SIGPIPE, SIG_IGN);
    if (count == 4 && strcmp(words[1], "serve") == 0) return serve(words[2], atoi(words[3]));
    if (count == 4 && strcmp(words[1], "call") == 0) return call(words[2], (uint64_t)atoll(words[3]) << 20);
    if (count == 4 && strcmp(words[1], "pings") == 0) return pings(words[2], atoi(words[3]));
    fputs("usage: sockets serve|call|pings vsock:PORT|PATH[:PORT] NUMBER\n", stderr);
    return 64;
}
