// SPDX-License-Identifier: Apache-2.0

public import Inventory
internal import Linux

/// A machine as a document of libvirt describes it (https://libvirt.org/formatdomain.html).
public struct Domain {
    public let name: String
    /// Paths are as the document has them.
    public let definition: Definition
    /// What a machine here has otherwise than the document says, or than libvirt would have made it.
    public let notes: [Note]

    public struct Note: Equatable, Sendable, CustomStringConvertible {
        public enum Kind: Sendable {
            /// A part of the document that has no effect.
            case ignored
            /// Something that the document leaves to libvirt, which would do it otherwise.
            case otherwise
        }

        public let kind: Kind
        /// Such as `devices/disk[2]/driver/@io`.
        public let path: String
        /// Empty where nothing more can be said.
        public let reason: String

        public var description: String {
            switch kind {
            case .ignored: "ignored: \(path.printable)\(reason.isEmpty ? "" : ": " + reason.printable)"
            case .otherwise: "\(path.printable): \(reason.printable)"
            }
        }
    }

    /// The namespace of what is only swkvm's, in a document's metadata.
    static let namespace = "urn:swkvm:machine:1"

    /// Reads a document.
    /// - Parameter network: the value of `--net` in the place of a network of libvirt's.
    public init(_ bytes: [UInt8], network: String = "nat") throws(DomainError) {
        try self.init(XMLReader.read(bytes), network: network)
    }

    init(_ root: Element, network: String = "nat") throws(DomainError) {
        var reader = DomainReader(root, network: network)
        try reader.read()
        (name, definition, notes) = (reader.name, Definition(reader.options), reader.allNotes())
    }
}
