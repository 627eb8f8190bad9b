// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc

/// A system call that failed: its name and `errno`.
///
/// The description is a phrase such as `open: No such file or directory`, for a caller to put into a sentence that
/// states what was attempted and what to do.
public struct SystemCallError: Error, Equatable, CustomStringConvertible {
    /// The call's name as in section 2 of the manual.
    public let call: String
    /// The error number (`ENOENT`, `EPERM`, …).
    public let errno: Int32

    public init(_ call: String, errno: Int32) {
        self.call = call
        self.errno = errno
    }

    /// The error that the calling thread's last failed call left in `errno`.
    public static func last(_ call: String) -> SystemCallError {
        SystemCallError(call, errno: Glibc.errno)
    }

    public var description: String { "\(call): \(reason)" }

    /// The text of `strerror`, without the call's name.
    public var reason: String {
        // strerror_r ends its text with a NUL within the buffer, also when it cuts it short.
        unsafe withUnsafeTemporaryAllocation(of: CChar.self, capacity: 128) { buffer in
            guard let text = buffer.baseAddress, unsafe strerror_r(errno, text, buffer.count) == 0 else {
                return "error \(errno)"
            }
            return unsafe String(cString: text)
        }
    }
}

/// Calls `body` again for as long as it fails with `EINTR`; -1 is failure, as in libc.
@inline(__always)
func retryingInterrupts<Result: FixedWidthInteger & SignedInteger>(
    _ call: String, _ body: () -> Result
) throws(SystemCallError) -> Result {
    while true {
        let result = body()
        if result >= 0 { return result }
        let error = SystemCallError.last(call)
        if error.errno != EINTR { throw error }
    }
}
