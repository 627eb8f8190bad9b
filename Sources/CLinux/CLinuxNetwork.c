// SPDX-License-Identifier: Apache-2.0

#define _GNU_SOURCE
#include "CLinux.h"

#include <net/if.h>
#include <nss.h>
#include <sys/auxv.h>

int clinux_tun_attach(int fd, char *name, unsigned flags) {
    struct ifreq request;
    memset(&request, 0, sizeof request);
    memcpy(request.ifr_name, name, IFNAMSIZ);
    request.ifr_flags = (short)flags;
    int status = ioctl(fd, TUNSETIFF, &request);
    if (status >= 0) memcpy(name, request.ifr_name, IFNAMSIZ);
    return status;
}

int clinux_tun_describe(int fd, char *name, unsigned *flags) {
    struct ifreq request;
    memset(&request, 0, sizeof request);
    int status = ioctl(fd, TUNGETIFF, &request);
    if (status < 0) return status;
    memcpy(name, request.ifr_name, IFNAMSIZ);
    *flags = (unsigned short)request.ifr_flags;
    return status;
}

int clinux_tun_use_queue(int fd, int is_used) {
    struct ifreq request;
    memset(&request, 0, sizeof request);
    request.ifr_flags = is_used ? IFF_ATTACH_QUEUE : IFF_DETACH_QUEUE;
    return ioctl(fd, TUNSETQUEUE, &request);
}

void clinux_resolve_hosts_alone(void) {
    // A program without an interpreter is static.
    if (getauxval(AT_BASE) == 0) __nss_configure_lookup("hosts", "files dns");
}

int clinux_unshare_network(void) { return unshare(CLONE_NEWNET); }

int clinux_unshare_root(void) { return unshare(CLONE_FS); }

int clinux_enter_network(int namespace_fd) { return setns(namespace_fd, CLONE_NEWNET); }

int clinux_has_capability(int capability) {
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct sets[_LINUX_CAPABILITY_U32S_3];
    if (syscall(SYS_capget, &header, sets) < 0) return 0;
    return (sets[CAP_TO_INDEX(capability)].effective & CAP_TO_MASK(capability)) != 0;
}

int clinux_drop_thread_capability(int capability) {
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct sets[_LINUX_CAPABILITY_U32S_3];
    if (syscall(SYS_capget, &header, sets) < 0) return -1;
    unsigned word = CAP_TO_INDEX(capability), bit = CAP_TO_MASK(capability);
    sets[word].effective &= ~bit;
    sets[word].permitted &= ~bit;
    sets[word].inheritable &= ~bit;
    return (int)syscall(SYS_capset, &header, sets);
}
