// SPDX-License-Identifier: Apache-2.0

/// The name of a network interface: 1 to 15 printable ASCII characters.
///
/// The kernel takes a little more (other bytes) and a little less than one would think: it fills in a `%d`
/// and refuses `/`, `:`, white space, `.` and `..`. Here a name is only ever a name.
public struct InterfaceName: Hashable, Sendable, CustomStringConvertible {
    public let text: String

    /// - Throws: `badInterfaceName`.
    public init(_ text: String) throws(HostNetworkError) {
        if let problem = Self.problem(of: text) { throw .badInterfaceName(text, problem) }
        self.text = text
    }

    /// A name that the kernel gave.
    init(fromKernel text: String) { self.text = text }

    public var description: String { text }

    /// The longest name, in bytes: `IFNAMSIZ` less the NUL.
    public static let maximumLength = 15

    /// A problem of a name.
    public enum Problem: Equatable, Sendable {
        case empty
        /// The length in bytes.
        case tooLong(Int)
        /// The first character that a name cannot have.
        case character(Character)
        /// `.` and `..`.
        case reserved
    }

    private static func problem(of text: String) -> Problem? {
        if text.isEmpty { return .empty }
        if text.utf8.count > maximumLength { return .tooLong(text.utf8.count) }
        if text == "." || text == ".." { return .reserved }
        let allowed: (Character) -> Bool = { character in
            guard let code = character.asciiValue else { return false }
            return code > 0x20 && code < 0x7f && character != "/" && character != ":" && character != "%"
        }
        return text.first { !allowed($0) }.map { .character($0) }
    }
}
