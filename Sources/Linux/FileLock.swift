// SPDX-License-Identifier: Apache-2.0

internal import Glibc

/// A lock on a whole open file or directory (flock(2)) that keeps other users of such locks out, and that ends with the
/// value.
///
/// The lock belongs to the open file, which a process that another thread is just forking shares until its exec.
/// Closing alone would leave the lock to it for that time, so the end of the value unlocks.
public struct FileLock: ~Copyable {
    private let descriptor: FileDescriptor

    /// Takes the lock if nobody has it.
    /// - Throws: `EWOULDBLOCK` while somebody has it.
    public init(_ descriptor: consuming FileDescriptor) throws(SystemCallError) {
        let number = descriptor.rawValue
        _ = try retryingInterrupts("flock") { flock(number, LOCK_EX | LOCK_NB) }
        self.descriptor = descriptor
    }

    deinit { _ = flock(descriptor.rawValue, LOCK_UN) }
}
