// SPDX-License-Identifier: Apache-2.0

internal import Glibc

/// Tells what is not worth the time of a compressor: encrypted data, archives, pictures. A look costs a tenth of what zlib takes to find out
/// (zstd finds out as quickly by itself).
///
/// Deflate saves in two ways, by shorter codes for frequent bytes and by references to what was there before. Where neither would save a
/// sixty-fourth of a cluster, the cluster is stored as it is; what is lost is less than that.
@safe struct Compressibility: ~Copyable {
    private static let window = 4096
    private static let hashBits: UInt32 = 13
    private static let chunk = 16 << 10

    /// Where the four bytes with a hash were last seen, from the start of the cluster, plus one.
    private let seen: UnsafeMutableBufferPointer<UInt32>

    init() {
        unsafe seen = .allocate(capacity: 1 << Int(Self.hashBits))
    }

    deinit {
        unsafe seen.deallocate()
    }

    /// Indicates whether a compressor has a chance with a cluster.
    func isLikely(_ cluster: UnsafeRawBufferPointer) -> Bool {
        let limit = cluster.count / 64
        var saved = 0.0
        var start = 0
        while start < cluster.count {
            let end = min(start + Self.chunk, cluster.count)
            saved += unsafe savedByCodes(UnsafeRawBufferPointer(rebasing: cluster[start..<end]))
            if saved >= Double(limit) { return true }
            start = end
        }
        return unsafe saved + Double(savedByReferences(cluster, limit)) >= Double(limit)
    }

    /// Bytes that a code for bytes by their frequency saves (their entropy).
    private func savedByCodes(_ bytes: UnsafeRawBufferPointer) -> Double {
        // Four tables, so that equal bytes in a row need not wait for each other.
        unsafe withUnsafeTemporaryAllocation(of: UInt32.self, capacity: 4 * 256) { counts in
            unsafe counts.initialize(repeating: 0)
            var index = 0
            // Bytes select entries of a table of 256.
            while index + 4 <= bytes.count {
                unsafe counts[Int(bytes[index])] += 1
                unsafe counts[256 + Int(bytes[index + 1])] += 1
                unsafe counts[512 + Int(bytes[index + 2])] += 1
                unsafe counts[768 + Int(bytes[index + 3])] += 1
                index += 4
            }
            let total = Double(index)
            var bits = 0.0
            for byte in 0..<256 {
                let count = unsafe Double(counts[byte] + counts[256 + byte] + counts[512 + byte] + counts[768 + byte])
                if count > 0 { bits += count * log2(total / count) }
            }
            return total - bits / 8
        }
    }

    /// Bytes that references to earlier bytes save, as far as is needed to know that they are `limit`.
    private func savedByReferences(_ bytes: UnsafeRawBufferPointer, _ limit: Int) -> Int {
        unsafe seen.update(repeating: 0)
        var saved = 0, index = 0
        // Four bytes from `index` on are inside, and hashes are places of the table.
        while index + 4 <= bytes.count {
            let word = unsafe bytes.loadUnaligned(fromByteOffset: index, as: UInt32.self)
            let hash = Int((word &* 2_654_435_761) >> (32 - Self.hashBits))
            let last = unsafe Int(seen[hash]) - 1
            unsafe seen[hash] = UInt32(index + 1)
            if last >= 0, index - last <= Self.window, unsafe bytes.loadUnaligned(fromByteOffset: last, as: UInt32.self) == word {
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
