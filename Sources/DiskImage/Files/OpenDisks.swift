// SPDX-License-Identifier: Apache-2.0

/// The disks of one machine that are open already: they show whether a locked file belongs to one of them.
public struct OpenDisks: Sendable {
    private var disks: [(path: String, identities: [ImageFile.Identity])] = []

    public init() {}

    public mutating func add(_ image: DiskImage) { disks.append((image.path, image.identities)) }

    /// Explains why a further disk of the machine could not be opened.
    public func explain(_ error: DiskImageError, opening path: String) -> DiskImageError {
        guard case .locked(let file, _) = error.cause, let identity = ImageFile.Identity(ofPath: file),
            let other = disks.first(where: { $0.identities.contains(identity) })
        else { return error }
        return .sameDisk(path: path, file: file, other: other.path)
    }
}
