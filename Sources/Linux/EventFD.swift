// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc

/// An eventfd: a counter in the kernel that wakes the threads that wait for it (eventfd(2)).
///
/// What a guest and its devices signal each other by: KVM signals one for a queue notification (ioeventfd),
/// a device signals one for an interrupt (irqfd). It never blocks.
public struct EventFD: ~Copyable, Sendable {
    public let descriptor: FileDescriptor

    public var rawValue: Int32 { descriptor.rawValue }

    public init() throws(SystemCallError) {
        let number = eventfd(0, Int32(EFD_CLOEXEC | EFD_NONBLOCK))
        if number < 0 { throw .last("eventfd") }
        descriptor = FileDescriptor(owning: number)
    }

    private init(_ descriptor: consuming FileDescriptor) { self.descriptor = descriptor }

    /// A second descriptor of the same counter.
    public func duplicate() throws(SystemCallError) -> EventFD { EventFD(try descriptor.duplicate()) }

    /// Signals it. A full counter (2^64 − 2 signals unread) already says all there is to say, so nothing can fail.
    public func signal() {
        // write(2) and not eventfd_write(3), within which ThreadSanitizer does not see that one thread wakes another.
        var one: UInt64 = 1
        _ = unsafe write(rawValue, &one, MemoryLayout<UInt64>.size)
    }

    /// Takes the count of signals since the last call; 0 when there was none.
    @discardableResult
    public func drain() -> UInt64 {
        var count: UInt64 = 0
        // A whole count or none.
        return unsafe read(rawValue, &count, MemoryLayout<UInt64>.size) == MemoryLayout<UInt64>.size ? count : 0
    }

    /// Indicates whether there is a signal that has not been taken.
    public var isSignalled: Bool {
        var entry = pollfd(fd: rawValue, events: Int16(POLLIN), revents: 0)
        // One entry, which lives as long as the call.
        return unsafe poll(&entry, 1, 0) == 1 && entry.revents & Int16(POLLIN) != 0
    }
}
