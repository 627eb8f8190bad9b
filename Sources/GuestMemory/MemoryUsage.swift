// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// The resident part of a guest's memory, in bytes.
public struct MemoryUsage: Equatable, Sendable {
    /// Bytes that have a page in RAM.
    public var resident: UInt64 = 0
    /// Those of them that were written: what a copy of the machine would have to carry.
    public var dirty: UInt64 = 0
    /// Those of them that transparent huge pages hold.
    public var transparentHuge: UInt64 = 0
}

extension GuestMemory {
    /// Reads the kernel's figures for this memory (/proc/self/smaps). It walks the page tables: for a status line, not
    /// a loop.
    public func usage() throws(GuestMemoryError) -> MemoryUsage {
        let text: [UInt8]
        do throws(SystemCallError) {
            switch mappings {
            case .some(let mappings): text = try readFile(mappings, limit: 16 << 20)
            case nil: throw SystemCallError("open", errno: ENOENT)
            }
        } catch {
            throw .refused(size: size, error)
        }
        let start = unsafe UInt64(UInt(bitPattern: regions[0].host))  // only its number
        let own = start..<start &+ size
        var usage = MemoryUsage()
        var isOwn = false
        for line in text.split(separator: UInt8(ascii: "\n")) {
            if let mapping = mappingStart(line) {
                isOwn = own.contains(mapping)
            } else if isOwn {
                // Pages of hugetlb are not in Rss, nor in the figures of dirty ones; they come by being written.
                for name in ["Rss:", "Private_Hugetlb:", "Shared_Hugetlb:"] {
                    usage.resident &+= kilobytes(in: line, of: name) ?? 0
                }
                for name in ["Private_Dirty:", "Shared_Dirty:", "Private_Hugetlb:", "Shared_Hugetlb:"] {
                    usage.dirty &+= kilobytes(in: line, of: name) ?? 0
                }
                for name in ["AnonHugePages:", "ShmemPmdMapped:"] {
                    usage.transparentHuge &+= kilobytes(in: line, of: name) ?? 0
                }
            }
        }
        return usage
    }
}

/// The first address of a mapping's line, `7f0000000000-7f0000200000 rw-p …`; nil for its details' lines, `Rss: …`.
private func mappingStart(_ line: ArraySlice<UInt8>) -> UInt64? {
    guard let first = line.first, first < UInt8(ascii: "A") || first >= UInt8(ascii: "a") else { return nil }
    let digits = line.prefix { $0 != UInt8(ascii: "-") }
    return UInt64(String(decoding: digits, as: UTF8.self), radix: 16)
}
