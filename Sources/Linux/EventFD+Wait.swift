internal import CLinux
internal import Glibc

extension EventFD {
    /// Waits until somebody rings, then takes the count. For threads that have nothing else to wait for.
    public func wait() {
        var entry = pollfd(fd: rawValue, events: Int16(POLLIN), revents: 0)
        // EINTR and a count that another waiter took lead to another look.
        while drain() == 0 { unsafe poll(&entry, 1, -1) }
    }
}
