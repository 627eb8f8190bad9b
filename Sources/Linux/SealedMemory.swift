// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc

extension FileDescriptor {
    /// Creates a file in memory, sealed against any further change (memfd_create(2)).
    /// - Parameter name: for `/proc` alone.
    public static func sealedMemory(
        _ name: String, contents: [UInt8]
    ) throws(SystemCallError) -> FileDescriptor {
        let file = try memory(name)
        try file.writeAll(contents)
        _ = try retryingInterrupts("fcntl") { clinux_seal(file.rawValue) }
        return file
    }

    /// Creates an empty file in memory.
    /// - Parameter name: for `/proc` alone.
    public static func memory(_ name: String) throws(SystemCallError) -> FileDescriptor {
        FileDescriptor(
            owning: try retryingInterrupts("memfd_create") {
                // A string for the call.
                unsafe name.withCString { unsafe clinux_memfd_create($0, UInt32(MFD_CLOEXEC | MFD_ALLOW_SEALING)) }
            })
    }
}
