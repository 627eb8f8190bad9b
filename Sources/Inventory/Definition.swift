// SPDX-License-Identifier: Apache-2.0

/// What a machine is: the options that `swkvm run` gets for it, in their order.
///
/// A definition has no vocabulary of its own: each key of its file is a long option of `swkvm run`.
public struct Definition: Equatable, Sendable {
    /// An option without its hyphens, and its value.
    public struct Option: Equatable, Sendable {
        public let name: String
        /// nil for an option that was given without a value.
        public let value: String?

        public init(_ name: String, _ value: String? = nil) {
            self.name = name
            self.value = value
        }
    }

    public var options: [Option]

    public init(_ options: [Option] = []) { self.options = options }

    /// The words of a command line. A value follows an equals sign, so that one that begins with a hyphen is no option.
    public var words: [String] { options.map { option in "--" + option.name + (option.value.map { "=" + $0 } ?? "") } }

    /// The values of an option, in their order.
    public func values(of name: String) -> [String] { options.compactMap { $0.name == name ? $0.value : nil } }

    /// The last value of an option, which is the one that counts.
    public func value(of name: String) -> String? { values(of: name).last }

    /// Options that say what boots.
    public static let bootOptions = ["firmware", "kernel", "boot"]

    /// Indicates whether one of the options says what boots: otherwise it is the bundled guest.
    public var statesWhatBoots: Bool { Self.bootOptions.contains(where: has) }

    public func has(_ name: String) -> Bool { options.contains { $0.name == name } }

    /// Replaces all values of an option by one, or adds it.
    public mutating func set(_ name: String, to value: String?) {
        options.removeAll { $0.name == name }
        options.append(Option(name, value))
    }
}
