// SPDX-License-Identifier: Apache-2.0

internal import Glibc

/// A lock for state that several threads need for a moment each.
///
/// It spins for a little before it sleeps, as its holder will be done sooner than a thread has slept and woken. Taking
/// and releasing it are two calls, for state that is not one value; a ``Guarded`` has one that is.
@safe public struct Lock: ~Copyable, @unchecked Sendable {
    // A mutex stays where it was made. It is what threads may share: hence `Sendable`.
    private let mutex: UnsafeMutablePointer<pthread_mutex_t>

    public init() {
        var attributes = pthread_mutexattr_t()
        unsafe pthread_mutexattr_init(&attributes)
        unsafe pthread_mutexattr_settype(&attributes, Int32(PTHREAD_MUTEX_ADAPTIVE_NP))
        unsafe mutex = .allocate(capacity: 1)
        unsafe mutex.initialize(to: pthread_mutex_t())
        unsafe pthread_mutex_init(mutex, &attributes)
        unsafe pthread_mutexattr_destroy(&attributes)
    }

    deinit {
        unsafe pthread_mutex_destroy(mutex)
        unsafe mutex.deallocate()
    }

    // The mutex lives as long as `self`.

    /// Waits until the lock is free, and takes it. It is not recursive.
    public func lock() { unsafe pthread_mutex_lock(mutex) }

    /// Releases the lock; called by the thread that took it.
    public func unlock() { unsafe pthread_mutex_unlock(mutex) }
}
