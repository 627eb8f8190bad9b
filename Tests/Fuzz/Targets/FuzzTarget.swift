// SPDX-License-Identifier: Apache-2.0

import TestSupport

/// Something that reads untrusted bytes, and bytes to begin with.
///
/// `make fuzz` gives the targets to libFuzzer, `swift test` to ``Mutator``. A new one goes into ``all`` and is run by
/// both.
public struct FuzzTarget: Sendable {
    /// As `make fuzz TARGETS=` names it.
    public let name: String
    /// Inputs that are accepted: what mutations start from.
    public let seeds: [[UInt8]]
    /// Uses an input. Any error is an answer; a trap or a broken promise ends the process. True if the input was
    /// accepted.
    public let run: @Sendable ([UInt8]) -> Bool

    /// Nothing, for what the program takes without a target.
    public static let none = FuzzTarget(name: "none", seeds: []) { _ in false }

    public static let all =
        [kernel, compressedKernel] + disks + [nbd, pci, mmio, balloon, firmwareConfiguration] + queues
        + [debugger, netlink, domain, metadata, metadataText]
}

extension FuzzTarget {
    /// Writes a number into a seed.
    static func put(_ file: inout [UInt8], _ offset: Int, _ value: UInt64, _ width: Int, isBig: Bool = false) {
        for index in 0..<width {
            file[offset + index] = UInt8(truncatingIfNeeded: value >> UInt64(8 * (isBig ? width - 1 - index : index)))
        }
    }
}

/// Makes inputs of other inputs, the same ones for the same seed.
public struct Mutator {
    private var generator: SeededGenerator

    public init(seed: UInt64) { generator = SeededGenerator(seed: seed) }

    /// From 0 to `count` - 1; `count` is at least 1.
    private mutating func below(_ count: Int) -> Int { Int(generator.next() % UInt64(count)) }

    /// One of the target's seeds with some changes: bytes, fields at the edges of their ranges, cuts, copies from one
    /// place to another.
    public mutating func input(for target: FuzzTarget) -> [UInt8] {
        var bytes = target.seeds[below(target.seeds.count)]
        for _ in 0...below(5) where !bytes.isEmpty { change(&bytes) }
        return bytes
    }

    private mutating func change(_ bytes: inout [UInt8]) {
        // Headers come first in a file and say most.
        let place = below(4) == 0 ? below(bytes.count) : below(min(bytes.count, 0x280))
        switch below(16) {
        case 0: bytes.removeLast(below(bytes.count))
        case 1: bytes += (0..<below(600)).map { _ in UInt8(truncatingIfNeeded: generator.next()) }
        case 2:
            let from = below(bytes.count), count = below(min(64, bytes.count - max(from, place)) + 1)
            bytes.replaceSubrange(place..<place + count, with: Array(bytes[from..<from + count]))
        case 3...8: bytes[place] = UInt8(truncatingIfNeeded: generator.next())
        case 9, 10: bytes[place] ^= 1 << UInt8(below(8))
        default: store(edge(), width: 1 << below(4), at: place, in: &bytes)
        }
    }

    /// Where arithmetic goes wrong, and addresses of a machine.
    private mutating func edge() -> UInt64 {
        let edges: [UInt64] = [
            0, 1, 0x7f, 0xff, 0x1000, 0x7fff, 0xffff, 0x1_0000, 0x10_0000, 0x100_0000, 0x200_0000, 0x7fff_ffff,
            0xc000_0000, 0xffff_ffff,
            1 << 32, 1 << 63, .max,
        ]
        return edges[below(edges.count)] &+ UInt64(below(3)) &- 1
    }

    private func store(_ value: UInt64, width: Int, at place: Int, in bytes: inout [UInt8]) {
        for index in 0..<width where place + index < bytes.count {
            bytes[place + index] = UInt8(truncatingIfNeeded: value >> UInt64(8 * index))
        }
    }
}
