// SPDX-License-Identifier: Apache-2.0

#define _GNU_SOURCE
#include "CBench.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { HEADER = 12, LONGEST = 2048, BATCH = 64 };

static int bring_up(const char *name) {
    int socket_ = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (socket_ < 0) return -errno;
    struct ifreq request = {0};
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    int result = ioctl(socket_, SIOCGIFFLAGS, &request);
    request.ifr_flags |= IFF_UP;
    if (result == 0) result = ioctl(socket_, SIOCSIFFLAGS, &request);
    result = result < 0 ? -errno : 0;
    close(socket_);
    return result;
}

int bench_tap_open(const char *name) {
    int tap = open("/dev/net/tun", O_RDWR | O_CLOEXEC), header = HEADER;
    if (tap < 0) return -errno;
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    int result = ioctl(tap, TUNSETIFF, &request) < 0 || ioctl(tap, TUNSETVNETHDRSZ, &header) < 0 ? -errno : bring_up(name);
    if (result < 0) close(tap);
    return result < 0 ? result : tap;
}

int bench_packet_socket(const char *name) {
    int number = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0), on = 1;
    if (number < 0) return -errno;
    struct ifreq request = {0};
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    struct sockaddr_ll address = {.sll_family = AF_PACKET};
    int result = ioctl(number, SIOCGIFINDEX, &request);
    address.sll_ifindex = request.ifr_ifindex;
    if (result == 0) result = bind(number, (struct sockaddr *)&address, sizeof address);
    if (result == 0) result = setsockopt(number, SOL_PACKET, PACKET_QDISC_BYPASS, &on, sizeof on);
    if (result == 0) return number;
    result = -errno;
    close(number);
    return result;
}

void bench_frame(uint8_t *frame, size_t size) {
    static const uint8_t start[14] = {0x03, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2, 0x88, 0xb5};
    memset(frame, 0x5a, size);
    memcpy(frame, start, sizeof start < size ? sizeof start : size);
}

int bench_inject(int socket_, unsigned count, size_t size) {
    uint8_t frame[LONGEST];
    struct iovec piece = {frame, size};
    struct mmsghdr messages[BATCH];
    memset(messages, 0, sizeof messages);
    for (int i = 0; i < BATCH; i++) messages[i].msg_hdr = (struct msghdr){.msg_iov = &piece, .msg_iovlen = 1};
    bench_frame(frame, size);
    while (count > 0) {
        int sent = sendmmsg(socket_, messages, count < BATCH ? count : BATCH, 0);
        if (sent < 0 && errno != EINTR && errno != ENOBUFS) return -errno;
        if (sent > 0) count -= sent;
    }
    return 0;
}

int bench_tap_write(int tap, unsigned count, size_t size) {
    uint8_t packet[HEADER + LONGEST] = {0};
    bench_frame(packet + HEADER, size);
    for (; count > 0; count--)
        if (write(tap, packet, HEADER + size) < 0) return -errno;
    return 0;
}

int bench_tap_read(int tap, unsigned count, size_t size) {
    uint8_t packet[HEADER + LONGEST];
    while (count > 0) {
        ssize_t got = read(tap, packet, sizeof packet);
        if (got < 0) return -errno;
        if ((size_t)got == HEADER + size) count--;
    }
    return 0;
}
