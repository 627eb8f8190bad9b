// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
public import Linux

/// QEMU's image locks: for each permission that a user of an image has there is a byte of the file, 100 + n, and for
/// each that it does not share with others another, 200 + n. It holds a shared lock on each of these bytes, and checks
/// that no other user holds the opposite one. Nothing is ever locked exclusively, and the bytes need not exist.
private enum Permission: off_t, CaseIterable {
    case consistentRead = 0
    case write = 1
    case resize = 3

    static let held: off_t = 100
    static let refused: off_t = 200
}

/// Takes the locks of a reader, which tolerates other readers, or of a writer, which tolerates no other user.
///
/// They belong to the open file (`F_OFD_SETLK`), so they end with it however the process ends. qemu-img, QEMU and swkvm
/// keep each other out. A conflict has to last a fifth of a second to be one: the kernel closes the files of a killed
/// process with requests in flight a moment after its end, and a process that is just being forked holds them until its
/// exec.
func lockImage(_ file: borrowing FileDescriptor, path: String, writable: Bool) throws(DiskImageError) {
    var attempts = 0
    while true {
        do throws(DiskImageError) { return try tryLock(file, path: path, writable: writable) } catch {
            attempts += 1
            guard case .locked = error, attempts < 20 else { throw error }
            // Release our own locks while we wait, so that two simultaneous openers do not wait for each other.
            _ = clinux_ofd_lock(
                file.rawValue, Int16(F_UNLCK), Permission.held, Permission.refused - Permission.held + 100)
            usleep(.random(in: 5_000...15_000))
        }
    }
}

private func tryLock(_ file: borrowing FileDescriptor, path: String, writable: Bool) throws(DiskImageError) {
    let holds: [Permission] = writable ? [.consistentRead, .write, .resize] : [.consistentRead]
    let refuses: [Permission] = [.write, .resize]

    // First take, then check: of two simultaneous openers, at least one sees the other.
    for byte in holds.map({ Permission.held + $0.rawValue }) + refuses.map({ Permission.refused + $0.rawValue })
    where clinux_ofd_lock(file.rawValue, Int16(F_RDLCK), byte, 1) < 0 {
        let error = SystemCallError.last("fcntl")
        // A program that is not QEMU locks exclusively.
        if error.errno == EAGAIN || error.errno == EACCES { throw .locked(path: path, forWriting: true) }
        throw .lockingUnavailable(path: path, error)
    }
    for permission in refuses where isLocked(file, Permission.held + permission.rawValue) {
        throw .locked(path: path, forWriting: true)
    }
    for permission in holds where isLocked(file, Permission.refused + permission.rawValue) {
        throw .locked(path: path, forWriting: false)
    }
}

/// Indicates whether another process has a file as an image.
public func isImageInUse(_ file: borrowing FileDescriptor) -> Bool {
    for permission in Permission.allCases
    where isLocked(file, Permission.held + permission.rawValue)
        || isLocked(file, Permission.refused + permission.rawValue)
    {
        return true
    }
    return false
}

private func isLocked(_ file: borrowing FileDescriptor, _ byte: off_t) -> Bool {
    // Asked for an exclusive lock, the kernel names any holder but ourselves.
    clinux_ofd_lock_test(file.rawValue, Int16(F_WRLCK), byte, 1) != F_UNLCK
}
