// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc

/// Descriptors that a program which this process executes would get. Those of this module are none: only what the
/// process got itself, and what other libraries open.
public enum InheritableDescriptors {
    /// Their numbers, without the standard streams.
    public static var all: Set<Int32> {
        Set(
            directoryNames("/proc/self/fd").compactMap(Int32.init).filter { number in
                guard number > STDERR_FILENO else { return false }
                let flags = clinux_fcntl_value(number, F_GETFD, 0)
                return flags >= 0 && flags & FD_CLOEXEC == 0
            })
    }

    /// Has all but some be closed when a program is executed.
    public static func keep(_ others: Set<Int32>) {
        for number in all where !others.contains(number) { _ = clinux_fcntl_value(number, F_SETFD, Int(FD_CLOEXEC)) }
    }
}
