// SPDX-License-Identifier: Apache-2.0

/// The disks of one machine that are open already: of a file that is locked they tell whether it is by one of them.
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
