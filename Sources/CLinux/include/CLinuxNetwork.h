// SPDX-License-Identifier: Apache-2.0
// Network interfaces: the TUN/TAP calls that take the union-ridden struct ifreq, namespaces, capabilities.
#ifndef CLINUX_NETWORK_H
#define CLINUX_NETWORK_H

#include <linux/capability.h>
#include <linux/rtnetlink.h>
#include <stdint.h>
#include <sys/types.h>

/// Attaches a descriptor of /dev/net/tun to the interface called `name` (TUNSETIFF), creating it if it does not exist.
/// `name` has room for IFNAMSIZ bytes; the kernel writes the interface's name into it (it fills in a `%d`).
int clinux_tun_attach(int fd, char *name, unsigned flags);
/// The name (IFNAMSIZ bytes) and IFF_* flags of the interface that a descriptor is attached to (TUNGETIFF).
int clinux_tun_describe(int fd, char *name, unsigned *flags);
/// The Ethernet address (6 bytes) of the interface that a macvtap's descriptor is attached to (SIOCGIFHWADDR).
int clinux_tap_address(int fd, unsigned char *address);
/// Has a multi-queue interface use the queue of this descriptor, or not (TUNSETQUEUE).
int clinux_tun_use_queue(int fd, int is_used);

/// unshare(2) and setns(2) for the calling thread only: of the network namespace, of root and working directory.
int clinux_unshare_network(void);
int clinux_unshare_root(void);
int clinux_enter_network(int namespace_fd);

/// In a static program, has getaddrinfo look hosts up in /etc/hosts and DNS, whatever nsswitch.conf says: these two are in the program, all else are
/// shared libraries, for the C library of the host, which may be another one. Elsewhere it does nothing.
void clinux_resolve_hosts_alone(void);

/// Starts a program, whose standard error is `errors` and whose descriptor 3 is `socket`; it has no other open file, and
/// signals act on it as they do by default. Returns 0 or an error number.
int clinux_spawn(pid_t *process, const char *path, char *const *arguments, int socket, int errors);

/// Whether the calling thread has a capability (capget(2), effective set).
int clinux_has_capability(int capability);
/// Takes one capability away from the calling thread (permitted, effective and inheritable sets), for good.
int clinux_drop_thread_capability(int capability);

static const unsigned long CLINUX_TUNGETVNETHDRSZ = TUNGETVNETHDRSZ;
static const unsigned long CLINUX_TUNSETOWNER = TUNSETOWNER;
static const unsigned CLINUX_IFF_UP = 1;
static const unsigned CLINUX_IFF_LOWER_UP = 1 << 16;

/// What the dump needs that rtnetlink.h writes as a cast macro.
static const uint16_t CLINUX_NLM_F_DUMP = NLM_F_ROOT | NLM_F_MATCH;

#endif
