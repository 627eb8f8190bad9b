// SPDX-License-Identifier: Apache-2.0

/// A value that several threads use, one at a time: a thread that reads or changes it has its lock.
///
/// As `Mutex` of the standard library, which it takes the place of everywhere: that one waits by futex calls of its
/// own, which ThreadSanitizer does not know, so everything behind it looks like a race (`make tsan`). This one is
/// behind a ``Lock``.
@safe public struct Guarded<Value: ~Copyable>: ~Copyable, @unchecked Sendable {
    // The value stays where it was put, and is reached under the lock only: hence `Sendable`, whatever it is.
    @usableFromInline let lock: Lock
    @usableFromInline let value: UnsafeMutablePointer<Value>

    /// - Parameter value: what it is at first.
    public init(_ value: consuming sending Value) {
        lock = Lock()
        unsafe self.value = .allocate(capacity: 1)
        unsafe self.value.initialize(to: value)
    }

    deinit {
        // This was the last reference.
        unsafe value.deinitialize(count: 1)
        unsafe value.deallocate()
    }

    /// Waits until no other thread has the value, and runs `body` with it; not within another call for the same value.
    @inlinable public borrowing func withLock<Answer: ~Copyable, Failure: Error>(
        _ body: (inout sending Value) throws(Failure) -> sending Answer
    ) throws(Failure) -> sending Answer {
        lock.lock()
        defer { lock.unlock() }
        // Under the lock it is this thread's alone, and lives as long as `self`.
        return try unsafe body(&value.pointee)
    }
}
