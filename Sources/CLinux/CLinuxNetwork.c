// SPDX-License-Identifier: Apache-2.0

#define _GNU_SOURCE
#include "CLinux.h"

#include <net/if.h>
#include <nss.h>
#include <spawn.h>
#include <sys/auxv.h>

int clinux_spawn(pid_t *process, const char *path, char *const *arguments, int socket, int errors) {
    // Above the numbers that they get: none is overwritten before it has been used.
    int high_socket = fcntl(socket, F_DUPFD_CLOEXEC, 10), high_errors = fcntl(errors, F_DUPFD_CLOEXEC, 10);
    int status = high_socket < 0 || high_errors < 0 ? errno : 0;
    posix_spawn_file_actions_t files;
    posix_spawnattr_t attributes;
    posix_spawn_file_actions_init(&files);
    posix_spawnattr_init(&attributes);
    if (!status) status = posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDWR, 0);
    if (!status) status = posix_spawn_file_actions_adddup2(&files, 0, 1);
    if (!status) status = posix_spawn_file_actions_adddup2(&files, high_errors, 2);
    if (!status) status = posix_spawn_file_actions_adddup2(&files, high_socket, 3);
    if (!status) status = posix_spawn_file_actions_addclosefrom_np(&files, 4);
    sigset_t none, all;
    sigemptyset(&none);
    sigfillset(&all);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setsigdefault(&attributes, &all);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    if (!status) status = posix_spawn(process, path, &files, &attributes, arguments, environ);
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&files);
    if (high_socket >= 0) close(high_socket);
    if (high_errors >= 0) close(high_errors);
    return status;
}

int clinux_tun_attach(int fd, char *name, unsigned flags) {
    struct ifreq request;
    memset(&request, 0, sizeof request);
    memcpy(request.ifr_name, name, IFNAMSIZ);
    request.ifr_flags = (short)flags;
    int status = ioctl(fd, TUNSETIFF, &request);
    if (status >= 0) memcpy(name, request.ifr_name, IFNAMSIZ);
    return status;
}

int clinux_tap_address(int fd, unsigned char *address) {
    struct ifreq request;
    memset(&request, 0, sizeof request);
    int status = ioctl(fd, SIOCGIFHWADDR, &request);
    if (status >= 0) memcpy(address, request.ifr_hwaddr.sa_data, 6);
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
