// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// Why metadata is refused.
public enum MetadataProblem: Error, Equatable, Sendable, CustomStringConvertible {
    /// A text that is not JSON.
    /// - Parameter place: bytes before the mistake.
    case invalid(place: Int, reason: String)
    /// The metadata would be longer than it may be.
    case tooLong(limit: Int)
    /// A patch comes before the first value.
    case notInitialized

    public var description: String {
        switch self {
        case .invalid(let place, let reason): "not JSON: \(reason) at byte \(place)"
        case .tooLong(let limit): "the metadata has more than \(limit) bytes as JSON"
        case .notInitialized: "The MMDS data store is not initialized."
        }
    }
}

/// The metadata of a machine, which its guest reads from a ``MetadataEndpoint`` of each of its network interfaces, and
/// the tokens of its sessions. Any thread.
public final class MetadataStore: Sendable {
    /// How a guest has to ask.
    public enum Version: String, Sendable, CaseIterable {
        /// GET.
        case v1 = "V1"
        /// GET with the token of a session, which a PUT of /latest/api/token begins.
        case v2 = "V2"
    }

    /// The most bytes of the metadata as JSON: Firecracker's default.
    public static let defaultLimit = 51_200
    /// Seconds for which a token may be valid.
    public static let possibleLifetimes: ClosedRange<UInt32> = 1...21_600
    /// Tokens that are kept; a new one replaces the one that expires first.
    private static let maximumTokens = 256

    private struct State {
        var version: Version
        var value: MetadataValue?
        /// When each token expires, in milliseconds of the monotonic clock.
        var tokens: [String: UInt64] = [:]
    }

    private let limit: Int
    private let state: Guarded<State>

    public init(version: Version = .v1, limit: Int = defaultLimit) {
        self.limit = limit
        state = Guarded(State(version: version))
    }

    public var version: Version {
        get { state.withLock { $0.version } }
        set { state.withLock { $0.version = newValue } }
    }

    /// The metadata; null before the first ``put(_:)``.
    public var value: MetadataValue { state.withLock { $0.value ?? .null } }

    /// Replaces the metadata.
    /// - Throws: ``MetadataProblem/tooLong(limit:)``.
    public func put(_ value: MetadataValue) throws(MetadataProblem) {
        guard value.json.count <= limit else { throw .tooLong(limit: limit) }
        state.withLock { $0.value = value }
    }

    /// Merges a patch into the metadata (RFC 7396).
    /// - Throws: ``MetadataProblem/notInitialized``, ``MetadataProblem/tooLong(limit:)``; the metadata is unchanged.
    public func patch(_ patch: MetadataValue) throws(MetadataProblem) {
        let problem: MetadataProblem? = state.withLock { state in
            guard var value = state.value else { return .notInitialized }
            value.merge(patch)
            guard value.json.count <= limit else { return .tooLong(limit: limit) }
            state.value = value
            return nil
        }
        if let problem { throw problem }
    }

    /// A new token.
    /// - Parameters:
    ///   - lifetime: seconds, one of ``possibleLifetimes``.
    ///   - now: milliseconds of the monotonic clock.
    func makeToken(lifetime: UInt32, now: UInt64) -> String {
        var generator = SystemRandomNumberGenerator()
        let token = (0..<4).map { _ in
            let digits = String(generator.next() as UInt64, radix: 16)
            return String(repeating: "0", count: 16 - digits.count) + digits
        }.joined()
        state.withLock { state in
            if state.tokens.count >= Self.maximumTokens, let first = state.tokens.min(by: { $0.value < $1.value }) {
                state.tokens[first.key] = nil
            }
            state.tokens[token] = now &+ UInt64(lifetime) * 1000
        }
        return token
    }

    func isValid(_ token: String, now: UInt64) -> Bool {
        state.withLock { state in
            guard let end = state.tokens[token] else { return false }
            if end > now { return true }
            state.tokens[token] = nil
            return false
        }
    }
}
