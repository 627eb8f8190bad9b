// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// The access to a file of an image that the host refused.
struct FailedAccess: Sendable, Equatable {
    enum Call: UInt8 {
        case read, write, synchronize, allocate, truncate

        /// What messages name it.
        var name: String {
            switch self {
            case .read: "read"
            case .write: "write"
            case .synchronize: "fdatasync"
            case .allocate: "fallocate"
            case .truncate: "ftruncate"
            }
        }
    }

    let call: Call
    /// The file, by its number in the image.
    let file: Int
    /// Indicates whether it is the file with the metadata, where the data has a file of its own.
    var isMetadata = true
    let offset: UInt64
}

/// The last refused access to an image's metadata, for the message about the request that fails for it.
///
/// Metadata passes an errno value on, through all that needs it; this is where and in which file.
final class MetadataFailures: Sendable {
    private let last = Guarded<(access: FailedAccess, error: Int32)?>(nil)

    func note(_ access: FailedAccess, _ error: Int32) { last.withLock { $0 = (access, error) } }

    /// Forgets the last one, which had no consequence.
    func forget() { last.withLock { $0 = nil } }

    /// The last one, if it gave this errno value.
    func access(of error: Int32) -> FailedAccess? {
        last.withLock { $0.flatMap { $0.error == error ? $0.access : nil } }
    }
}
