// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// What the host itself does by IPv6 on an interface that it shares with guests.
///
/// By default, Linux takes an address and a default route from any router that announces itself there (RFC 4861
/// §6.3.4): a guest could lead the host's own traffic through itself.
enum HostIPv6 {
    /// Nothing: the host has no address there, not even a link-local one.
    case off
    /// It ignores routers; a user can still give the interface addresses.
    case withoutRouters

    /// Changes an interface of the thread's network namespace, which is best still down.
    /// - Returns: what a user is to know; nil if it is done, or the kernel has no IPv6.
    func apply(to interface: InterfaceName) -> String? {
        let (file, value) = self == .off ? ("disable_ipv6", "1") : ("accept_ra", "0")
        let path = "/proc/sys/net/ipv6/conf/\(interface)/\(file)"
        do throws(SystemCallError) {
            try FileDescriptor.open(path, O_WRONLY).writeAll(Array(value.utf8))
            return nil
        } catch {
            if error.errno == ENOENT { return nil }
            return
                "guests on \(interface) can announce themselves to this host as IPv6 routers: could not write \(value) to \(path): \(error.reason)"
        }
    }
}
