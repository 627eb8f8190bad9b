// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc

extension EventFD {
    /// Waits until it is signalled, then takes the count. For threads that have nothing else to wait for.
    public func wait() {
        // A signal and a count that another waiter took lead to another look.
        while drain() == 0 { waitUntilReadable(rawValue) }
    }
}

/// Waits until a descriptor is readable, or a signal comes.
public func waitUntilReadable(_ descriptor: Int32) {
    var entry = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
    // One entry; the caller then reads the descriptor.
    _ = unsafe poll(&entry, 1, -1)
}

/// Returns when one of two descriptors is readable, or a signal has come.
public func waitUntilReadable(_ first: Int32, or second: Int32) {
    var entries = [first, second].map { pollfd(fd: $0, events: Int16(POLLIN), revents: 0) }
    // The array has two entries.
    _ = unsafe poll(&entries, 2, -1)
}
