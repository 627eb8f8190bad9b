// SPDX-License-Identifier: Apache-2.0

internal import Glibc

/// Detects data that is not worth compressing: encrypted data, archives, pictures. The check costs a tenth of the time
/// that zlib needs to find out (zstd finds out as quickly by itself).
///
/// Deflate saves in two ways, by shorter codes for frequent bytes and by references to earlier data. If neither would
/// save a sixty-fourth of a cluster, the cluster is stored uncompressed; the loss is less than that.
struct Compressibility: ~Copyable {
    private static let window = 4096
    private static let hashBits: UInt32 = 13
    private static let chunk = 16 << 10

    /// Where the four bytes with a hash were last seen, from the start of the cluster, plus one.
    private let seen = Slab(count: 1 << Int(hashBits)) { _ in 0 as UInt32 }

    /// Indicates whether a compressor has a chance with a cluster.
    func isLikely(_ cluster: IOMemory) -> Bool {
        let limit = cluster.count / 64
        var saved = 0.0
        var start = 0
        while start < cluster.count {
            let end = min(start + Self.chunk, cluster.count)
            saved += savedByCodes(cluster.piece(start, end - start))
            if saved >= Double(limit) { return true }
            start = end
        }
        return saved + Double(savedByReferences(cluster, limit)) >= Double(limit)
    }

    /// Bytes that a code for bytes by their frequency saves (their entropy).
    private func savedByCodes(_ bytes: IOMemory) -> Double {
        // Four tables, so that equal bytes in a row need not wait for each other.
        var counts = InlineArray<1024, UInt32>(repeating: 0)
        var index = 0
        while index + 4 <= bytes.count {
            let word = bytes.load(littleEndian: index, as: UInt32.self)
            counts[Int(word & 255)] &+= 1
            counts[256 + Int(word >> 8 & 255)] &+= 1
            counts[512 + Int(word >> 16 & 255)] &+= 1
            counts[768 + Int(word >> 24)] &+= 1
            index += 4
        }
        let total = Double(index)
        var bits = 0.0
        for byte in 0..<256 {
            let count = Double(counts[byte] + counts[256 + byte] + counts[512 + byte] + counts[768 + byte])
            if count > 0 { bits += count * log2(total / count) }
        }
        return total - bits / 8
    }

    /// Bytes that references to earlier bytes save, as far as is needed to know that they are `limit`.
    private func savedByReferences(_ bytes: IOMemory, _ limit: Int) -> Int {
        for index in seen.indices { seen[index] = 0 }
        var saved = 0, index = 0
        // Four bytes from `index` on are inside, and hashes are places of the table.
        while index + 4 <= bytes.count {
            let word = bytes.load(index, as: UInt32.self)
            let hash = Int((word &* 2_654_435_761) >> (32 - Self.hashBits))
            let last = Int(seen[hash]) - 1
            seen[hash] = UInt32(index + 1)
            if last >= 0, index - last <= Self.window, bytes.load(last, as: UInt32.self) == word {
                // Four bytes of a longer piece each time; a reference by itself costs about two and a half.
                saved += 2
                if saved >= limit { return saved }
                index += 4
            } else {
                index += 1
            }
        }
        return saved
    }
}
