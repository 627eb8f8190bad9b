// SPDX-License-Identifier: Apache-2.0

internal import Devices
internal import Linux

/// The words of a ``RateLimit`` in an option's value: `bps=SIZE`, `bps-burst=SIZE` and, where operations are counted,
/// `iops=N` and `iops-burst=N` or the like.
struct LimitWords {
    private let bytesWord: String
    /// nil where only bytes are counted.
    private let operationsWord: String?
    private var values: [String: UInt64] = [:]

    /// - Parameters:
    ///   - prefix: before each word: `rx-`.
    ///   - operations: the word for them.
    init(prefix: String = "", operations: String?) {
        bytesWord = prefix + "bps"
        operationsWord = operations.map { prefix + $0 }
    }

    /// Takes a word and its value.
    /// - Returns: false when it is none of these.
    mutating func take(_ key: String, _ value: String?) throws(ArgumentProblem) -> Bool {
        let isBytes = key == bytesWord || key == bytesWord + "-burst"
        guard isBytes || operationsWord.map({ key == $0 || key == $0 + "-burst" }) == true else { return false }
        let number = value.flatMap { isBytes ? ByteSize(argument: $0)?.bytes : UInt64($0) }
        guard let number, number > 0, number <= UInt64(Int64.max) else {
            throw ArgumentProblem(
                "\(key)\(value.map { "=" + $0 } ?? "") is not a limit; expected "
                    + (isBytes ? "a number of bytes, such as 10M" : "a whole number, 1 or more"))
        }
        values[key] = number
        return true
    }

    /// The limit that the words make.
    func limit() throws(ArgumentProblem) -> RateLimit {
        RateLimit(
            bytes: try rate(bytesWord),
            operations: try operationsWord.flatMap { word throws(ArgumentProblem) in try rate(word) })
    }

    private func rate(_ word: String) throws(ArgumentProblem) -> TokenBucket.Rate? {
        let burst = values[word + "-burst"]
        guard let perSecond = values[word] else {
            if burst != nil { throw ArgumentProblem("\(word)-burst= requires \(word)=") }
            return nil
        }
        return TokenBucket.Rate(perSecond: perSecond, burst: burst)
    }
}
