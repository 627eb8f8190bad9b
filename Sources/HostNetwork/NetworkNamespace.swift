// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
public import Linux

/// A network namespace: its own interfaces, addresses and sockets (network_namespaces(7)). It lives as long as
/// a descriptor, a thread or a socket in it.
public struct NetworkNamespace: ~Copyable, Sendable {
    /// Refers to the namespace, also for other processes.
    public let descriptor: FileDescriptor

    /// The calling thread's namespace.
    public static func current() throws(HostNetworkError) -> NetworkNamespace {
        do { return NetworkNamespace(descriptor: try .open("/proc/thread-self/ns/net", O_RDONLY)) } catch {
            throw .refused(action: "opening /proc/thread-self/ns/net", error, explanation: "")
        }
    }

    /// A namespace by its name, as ip-netns(8) has it.
    /// - Throws: `namespaceMissing`.
    static func named(_ name: String) throws(HostNetworkError) -> NetworkNamespace {
        guard !name.isEmpty, name != ".", name != "..", !name.utf8.contains(UInt8(ascii: "/")) else {
            throw .namespaceMissing(name)
        }
        do { return NetworkNamespace(descriptor: try .open("/run/netns/\(name)", O_RDONLY)) } catch {
            if error.errno == ENOENT { throw .namespaceMissing(name) }
            throw .refused(action: "opening /run/netns/\(name.printable)", error, explanation: "")
        }
    }

    /// Moves the calling thread, and no other, into this namespace.
    public func enter() throws(HostNetworkError) {
        guard clinux_enter_network(descriptor.rawValue) < 0 else { return }
        let error = SystemCallError.last("setns")
        throw .refused(
            action: "changing the network namespace", error,
            explanation: error.errno == EPERM ? "it needs CAP_SYS_ADMIN" : "")
    }

    /// Waits until no other swkvm process changes bridges in this namespace, and keeps them waiting until ``unlock()``.
    ///
    /// The namespace's own file is the lock: it has just the right scope, needs no path and ends with the process.
    /// - Parameter patience: how many times it is tried, a millisecond apart: a process holds it for a few
    ///   netlink messages.
    /// - Throws: `namespaceLocked` when all tries failed.
    func lock(patience: Int = 5_000) throws(HostNetworkError) {
        var tries = patience
        while flock(descriptor.rawValue, LOCK_EX | LOCK_NB) < 0 {
            let error = SystemCallError.last("flock")
            guard error.errno == EWOULDBLOCK || error.errno == EINTR else {
                throw .refused(action: "locking the network namespace", error, explanation: "")
            }
            tries -= 1
            if tries == 0 { throw .namespaceLocked }
            usleep(1_000)
        }
    }

    func unlock() {
        _ = flock(descriptor.rawValue, LOCK_UN)
    }
}
