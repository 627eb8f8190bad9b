// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import HostNetwork
import Linux
import TestSupport
import Testing

/// The tests that need network namespaces, TAPs and bridges.
let rootNeeded: Comment = "needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN) to make a network namespace for the test"

/// Whether this process may make network namespaces with TAPs in them.
let mayMakeNamespaces: Bool =
    onOwnThread { () throws(HostNetworkError) in
        try NetworkNamespace.enterNew()
        _ = try TAPDevice.create(nil)
        return true
    } ?? false

/// Runs `body` in a network namespace of its own, on the calling thread, and goes back.
/// The body must not suspend, so it is not `async`.
func inNewNamespace(_ body: (Host) throws -> Void) throws {
    let home = try NetworkNamespace.current()
    try NetworkNamespace.enterNew()
    // A thread that stayed in the namespace would run other tests there.
    defer {
        do { try home.enter() } catch { fatalError("cannot go back to the test's own network namespace: \(error)") }
    }
    try body(Host(netlink: try RouteNetlink()))
}

/// A test's view of its namespace; a class, so that closures may use it.
final class Host: Sendable {
    let netlink: RouteNetlink
    init(netlink: consuming RouteNetlink) { self.netlink = netlink }
}

/// Runs `body` on a thread that ends afterwards, for what a thread cannot take back; nil when it throws.
/// The thread starts in the caller's network namespace.
func onOwnThread<Value: Sendable>(_ body: @escaping @Sendable () throws(HostNetworkError) -> Value?) -> Value? {
    result(onOwnThread: body).flatMap { try? $0.get() } ?? nil
}

/// The error that `body` throws on a thread of its own; nil when it throws none.
func failureOnOwnThread(_ body: @escaping @Sendable () throws(HostNetworkError) -> Void) -> HostNetworkError? {
    if case .failure(let error) = result(onOwnThread: body) { error } else { nil }
}

private func result<Value: Sendable>(
    onOwnThread body: @escaping @Sendable () throws(HostNetworkError) -> Value
) -> Result<Value, HostNetworkError>? {
    let box = Box<Result<Value, HostNetworkError>>()
    guard let thread = try? Thread.start(name: "test", stackSize: 1 << 20, { box.content = Result(catching: body) })
    else { return nil }
    thread.join()
    return box.content
}

/// What a thread leaves for the thread that joins it; the join orders the write before the read.
final class Box<Content>: @unchecked Sendable { var content: Content? }

/// The error that `body` throws.
func failure(_ body: () throws(HostNetworkError) -> Void) -> HostNetworkError? {
    do { try body() } catch { return error }
    return nil
}

func name(_ text: String) throws -> InterfaceName { try InterfaceName(text) }

extension TAPDevice {
    /// Makes the interface stay when its last descriptor is closed, or not.
    func setPersistent(_ on: Bool) throws {
        try #require(clinux_ioctl_value(descriptor, CLINUX_TUNSETPERSIST, on ? 1 : 0) == 0)
    }
}

/// A TAP that stays without a process, like one made by `ip tuntap add`.
func makePersistentTAP(_ text: String) throws {
    let tap = try TAPDevice.create(name(text))
    try tap.setPersistent(true)
}

/// A descriptor of /dev/net/tun with the given flags.
func openTUN(_ text: String, flags: Int32) throws -> FileDescriptor {
    let descriptor = try FileDescriptor.open("/dev/net/tun", O_RDWR)
    var buffer = [CChar](repeating: 0, count: Int(IFNAMSIZ))
    for (index, byte) in text.utf8.enumerated() { buffer[index] = CChar(bitPattern: byte) }
    // The buffer has IFNAMSIZ bytes.
    try #require(unsafe clinux_tun_attach(descriptor.rawValue, &buffer, UInt32(flags)) >= 0)
    return descriptor
}

/// Gives a descriptor up and makes it look like one that a starting process has passed on. Not sooner than it is taken
/// over: whatever is started meanwhile would get it too.
func passOn(_ descriptor: consuming FileDescriptor) throws -> Int32 {
    try #require(fcntl(descriptor.rawValue, F_SETFD, 0) == 0)
    return descriptor.release()
}
