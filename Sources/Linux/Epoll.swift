// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc

/// An epoll instance: waits for many descriptors, each known by a token of its owner's choice.
///
/// There are no callbacks: the owner's loop switches over the tokens, so the way of an event
/// costs no allocation and no reference count.
public struct Epoll: ~Copyable, Sendable {
    /// The events of a descriptor: the kernel's `EPOLL*` bits.
    public struct Events: OptionSet, Sendable {
        public let rawValue: UInt32
        public init(rawValue: UInt32) { self.rawValue = rawValue }
        public static let input = Events(rawValue: EPOLLIN.rawValue)
        public static let output = Events(rawValue: EPOLLOUT.rawValue)
        public static let hangUp = Events(rawValue: EPOLLHUP.rawValue)
        /// The peer of a stream socket has closed its sending side.
        public static let peerHangUp = Events(rawValue: EPOLLRDHUP.rawValue)
        public static let error = Events(rawValue: EPOLLERR.rawValue)
        public static let edgeTriggered = Events(rawValue: EPOLLET.rawValue)
    }

    private let descriptor: FileDescriptor

    /// Readable while something that it waits for is ready: another instance can watch this one.
    public var rawValue: Int32 { descriptor.rawValue }

    public init() throws(SystemCallError) {
        let number = epoll_create1(Int32(EPOLL_CLOEXEC))
        if number < 0 { throw .last("epoll_create1") }
        descriptor = FileDescriptor(owning: number)
    }

    /// Begins to watch a descriptor.
    public func add(_ watched: Int32, _ events: Events, token: UInt64) throws(SystemCallError) {
        try control(EPOLL_CTL_ADD, watched, events, token)
    }

    /// Changes what a watched descriptor is waited for.
    public func modify(_ watched: Int32, _ events: Events, token: UInt64) throws(SystemCallError) {
        try control(EPOLL_CTL_MOD, watched, events, token)
    }

    /// Stops watching; a descriptor that is not watched is left alone.
    public func remove(_ watched: Int32) {
        _ = epoll_ctl(descriptor.rawValue, EPOLL_CTL_DEL, watched, nil)
    }

    /// Waits, then hands each ready token to `body`; at most 16 a call, so no source starves another for long.
    /// - Parameter timeout: milliseconds; -1 waits without a limit, 0 does not wait.
    /// - Returns: how many were ready; 0 after the time-out or a signal.
    @discardableResult
    public func wait(
        timeout: Int32 = -1, _ body: (_ token: UInt64, _ events: Events) -> Void
    ) throws(SystemCallError) -> Int {
        let capacity = 16
        let failure: SystemCallError?
        let count: Int
        // The kernel fills at most `capacity` entries of the buffer; only the filled ones are read.
        (count, failure) = unsafe withUnsafeTemporaryAllocation(of: epoll_event.self, capacity: capacity) { buffer in
            let ready = unsafe epoll_wait(descriptor.rawValue, buffer.baseAddress!, Int32(capacity), timeout)
            if ready < 0 {
                let error = SystemCallError.last("epoll_wait")
                return (0, error.errno == EINTR ? nil : error)
            }
            for index in 0..<Int(ready) {
                unsafe body(buffer[index].data.u64, Events(rawValue: buffer[index].events))
            }
            return (Int(ready), nil)
        }
        if let failure { throw failure }
        return count
    }

    private func control(
        _ operation: Int32, _ watched: Int32, _ events: Events, _ token: UInt64
    ) throws(SystemCallError) {
        var event = unsafe epoll_event(events: events.rawValue, data: epoll_data_t(u64: token))
        if unsafe epoll_ctl(descriptor.rawValue, operation, watched, &event) < 0 { throw .last("epoll_ctl") }
    }
}
