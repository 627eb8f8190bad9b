// SPDX-License-Identifier: Apache-2.0

internal import CLinux
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

    /// Indicates whether a path still leads to what is locked: another process may have removed or replaced it before
    /// it was.
    public func isOf(_ path: String) -> Bool {
        var own = stat()
        guard unsafe fstat(descriptor.rawValue, &own) == 0, let there = fileStatus(ofPath: path, followsLinks: false)
        else { return false }
        return own.st_dev == there.st_dev && own.st_ino == there.st_ino
    }

    deinit { _ = flock(descriptor.rawValue, LOCK_UN) }
}
