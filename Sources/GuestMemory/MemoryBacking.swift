// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Linux

/// The kind of pages that back guest RAM.
public enum MemoryBacking: Equatable, Sendable {
    /// Ordinary pages, on demand.
    case anonymous
    /// The same, which the kernel is asked to make huge where the guest uses more than the first 4 MiB: a guest that
    /// needs no more, like the bundled one, starts no slower and takes no more memory than with ordinary pages.
    case automatic
    /// Pages of the host's pool (hugetlb), reserved for the guest at start.
    case hugePages(HugePageSize)
    /// Ordinary pages that the kernel is asked to join into huge ones when it can.
    case transparent

    /// Bytes of which guest memory must be a multiple.
    public var pageSize: UInt64 {
        if case .hugePages(let size) = self { size.bytes } else { 4096 }
    }

    /// How many bytes from the start are excluded when huge pages are requested of the kernel; nil if none are
    /// requested.
    var firstAdvisedByte: UInt64? {
        switch self {
        case .automatic: 2 * HugePageSize.twoMiB.bytes
        case .transparent: 0
        case .anonymous, .hugePages: nil
        }
    }

    /// Where the mapping may start, so that KVM can use large pages in the second stage too.
    var alignment: UInt64 { max(pageSize, HugePageSize.twoMiB.bytes) }
}

/// The sizes of huge pages on x86-64.
public enum HugePageSize: Sendable {
    case twoMiB, oneGiB

    public var bytes: UInt64 {
        switch self {
        case .twoMiB: 2 << 20
        case .oneGiB: 1 << 30
        }
    }

    /// Binary logarithm, as `MAP_HUGE_*` and `MFD_HUGE_*` want it in their upper six bits.
    var encoded: UInt32 { UInt32(bytes.trailingZeroBitCount) << 26 }
}

/// The host's pool of huge pages of one size.
public struct HugePagePool: Sendable {
    /// Pages in the pool that stay (without the surplus).
    public let total: UInt64
    /// Pages that a new mapping can have: free, not reserved, and those that the kernel may add by overcommit.
    public let available: UInt64
}

extension HugePagePool {
    /// Reads the pool's figures.
    /// - Throws: ``GuestMemoryError/noHugePages(pageSize:)`` where the kernel has no pages of this size.
    public init(_ size: HugePageSize) throws(GuestMemoryError) {
        let directory = Self.directory(pageSize: size.bytes)
        func figure(_ name: String) throws(GuestMemoryError) -> UInt64 {
            guard let text = try? readFile("\(directory)/\(name)", limit: 64),
                let number = decimal(text[...])
            else { throw .noHugePages(pageSize: size.bytes) }
            return number
        }
        // The kernel changes the figures between these reads: no difference may trap.
        let surplus = try figure("surplus_hugepages")
        total = subtract(surplus, from: try figure("nr_hugepages"))
        available =
            subtract(try figure("resv_hugepages"), from: try figure("free_hugepages"))
            &+ subtract(surplus, from: try figure("nr_overcommit_hugepages"))
    }

    static func directory(pageSize: UInt64) -> String { "/sys/kernel/mm/hugepages/hugepages-\(pageSize >> 10)kB" }

    /// Returns what is missing for `size` bytes, or nil if they are available.
    func shortage(for size: UInt64, in page: HugePageSize) -> HugePageShortage? {
        let wanted = size / page.bytes
        guard wanted > available else { return nil }
        return HugePageShortage(
            size: size, pageSize: page.bytes, free: available, suggestedTotal: total &+ (wanted - available),
            isDefaultSize: HostMemory.defaultHugePageSize == page.bytes)
    }
}

/// The host's memory in bytes (sysinfo(2)).
struct HostMemory {
    let ram: UInt64
    let swap: UInt64

    init() {
        var info = sysinfo()
        // It fails only for a bad pointer; all zero would then refuse every size.
        unsafe sysinfo(&info)
        ram = UInt64(info.totalram) &* UInt64(info.mem_unit)
        swap = UInt64(info.totalswap) &* UInt64(info.mem_unit)
    }

    /// Bytes in a huge page of the kernel's default size, that of `vm.nr_hugepages`; 0 when it has none.
    static var defaultHugePageSize: UInt64 {
        let lines = ((try? readFile("/proc/meminfo", limit: 64 << 10)) ?? []).split(separator: UInt8(ascii: "\n"))
        return lines.lazy.compactMap { kilobytes(in: $0, of: "Hugepagesize:") }.first ?? 0
    }
}

/// The value of a line such as `MemTotal:  24684312 kB`, in bytes, if its name is `name`.
func kilobytes(in line: ArraySlice<UInt8>, of name: String) -> UInt64? {
    guard line.starts(with: name.utf8) else { return nil }
    return decimal(line.dropFirst(name.utf8.count)).map { $0 &* 1024 }
}

/// The number at the start of a text, after blanks.
func decimal(_ text: ArraySlice<UInt8>) -> UInt64? {
    let digits = text.drop { $0 == UInt8(ascii: " ") || $0 == UInt8(ascii: "\t") }.prefix { (0x30...0x39).contains($0) }
    return UInt64(String(decoding: digits, as: UTF8.self))
}

private func subtract(_ part: UInt64, from whole: UInt64) -> UInt64 { whole > part ? whole - part : 0 }
