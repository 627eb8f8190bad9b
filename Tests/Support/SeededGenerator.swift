// SPDX-License-Identifier: Apache-2.0

/// Random numbers that are the same for the same seed (SplitMix64).
public struct SeededGenerator: RandomNumberGenerator, Sendable {
    private var state: UInt64

    public init(seed: UInt64) { state = seed }

    public mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var value = state
        value = (value ^ value >> 30) &* 0xbf58_476d_1ce4_e5b9
        value = (value ^ value >> 27) &* 0x94d0_49bb_1331_11eb
        return value ^ value >> 31
    }
}

extension SeededGenerator {
    /// A number from 0 up to but not including `bound`.
    public mutating func below(_ bound: UInt64) -> UInt64 { next() % bound }
    /// True so many times of a hundred.
    public mutating func chance(_ percent: UInt64) -> Bool { below(100) < percent }
}
