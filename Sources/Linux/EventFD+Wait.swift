// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc

extension EventFD {
    /// Waits until somebody rings, then takes the count. For threads that have nothing else to wait for.
    public func wait() {
        // A signal and a count that another waiter took lead to another look.
        while drain() == 0 { waitUntilReadable(rawValue) }
    }
}

/// Waits until a descriptor is readable, or a signal comes.
public func waitUntilReadable(_ descriptor: Int32) {
    var entry = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
    // One entry; who asks sees at the descriptor what it says.
    _ = unsafe poll(&entry, 1, -1)
}
