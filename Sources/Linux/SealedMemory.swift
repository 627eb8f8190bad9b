// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc

extension FileDescriptor {
    /// Creates a file in memory, sealed against any further change (memfd_create(2)).
    /// - Parameter name: for `/proc` alone.
    public static func sealedMemory(
        _ name: String, contents: [UInt8]
    ) throws(SystemCallError) -> FileDescriptor {
        let file = FileDescriptor(
            owning: try retryingInterrupts("memfd_create") {
                unsafe name.withCString { unsafe clinux_memfd_create($0, UInt32(MFD_CLOEXEC | MFD_ALLOW_SEALING)) }
            })
        try file.writeAll(contents)
        _ = try retryingInterrupts("fcntl") { clinux_seal(file.rawValue) }
        return file
    }
}
