// SPDX-License-Identifier: Apache-2.0

public import Linux

/// An error of guest memory.
public enum GuestMemoryError: Error, Equatable, CustomStringConvertible {
    /// A size of 0 was requested.
    case empty
    /// The size is not a multiple of the page size that backs it; both in bytes.
    case notPageMultiple(size: UInt64, pageSize: UInt64)
    /// More than the host has; bytes.
    case largerThanHost(size: UInt64, ram: UInt64, swap: UInt64)
    /// The host's pool of huge pages is too small.
    case hugePages(HugePageShortage)
    /// The host has no huge pages of this size, in bytes.
    case noHugePages(pageSize: UInt64)
    /// The host has no such NUMA node; `online` lists those it has, as the kernel writes it.
    case noHostNode(Int, online: String)
    /// More from certain nodes of the host than they have; bytes.
    case hostNodesTooSmall(size: UInt64, nodes: [Int], total: UInt64)
    /// The nodes' own huge pages do not suffice: bytes requested, bytes in a page, pages free on these nodes.
    case hugePagesOfNodes(size: UInt64, pageSize: UInt64, nodes: [Int], free: UInt64)
    /// The kernel refused to take memory from these nodes.
    case placement(size: UInt64, nodes: [Int], SystemCallError)
    /// The kernel refused the mapping, the memfd or the pages.
    case refused(size: UInt64, SystemCallError)
    /// Pages could not be touched ahead of time.
    case prealloc(size: UInt64, SystemCallError)
    /// The guest's memory and the process's overhead exceed the limit of its control group; bytes.
    case controlGroup(size: UInt64, overhead: UInt64, limit: UInt64, directory: String)
    /// The preallocation was cancelled on request.
    case interrupted
    /// A range that is not entirely in one region of guest RAM.
    case outOfRange(GuestAddress, count: UInt64)

    public var description: String {
        switch self {
        case .empty:
            "guest memory cannot be 0 bytes; specify a size, such as 512M"
        case .notPageMultiple(let size, let pageSize):
            "\(size) bytes of guest memory is not a multiple of its \(byteText(pageSize)) pages; "
                + "the next multiple is \(byteText(size / pageSize * pageSize &+ pageSize))"
        case .largerThanHost(let size, let ram, let swap):
            "\(byteText(size)) of guest memory exceeds what this host has "
                + "(\(roundedText(ram)) of RAM, \(swap == 0 ? "no" : roundedText(swap) + " of") swap); request less"
        case .hugePages(let shortage):
            shortage.description
        case .noHugePages(let pageSize):
            "this host's kernel has no \(byteText(pageSize)) huge pages; use another size or ordinary pages"
        case .noHostNode(let node, let online):
            "this host has no NUMA node \(node), it has \(online.isEmpty ? "none" : online): specify one of those, or omit the placement"
        case .hostNodesTooSmall(let size, let nodes, let total):
            "\(byteText(size)) of guest memory exceeds the \(roundedText(total)) of the host's \(nodeText(nodes)): specify more nodes, or request less"
        case .hugePagesOfNodes(let size, let pageSize, let nodes, let free):
            "\(byteText(size)) in \(byteText(pageSize)) pages of the host's \(nodeText(nodes)) needs \(size / pageSize) huge pages there, \(free) are free: "
                + nodes.map {
                    "`echo N > /sys/devices/system/node/node\($0)/hugepages/hugepages-\(pageSize >> 10)kB/nr_hugepages`"
                }.joined(separator: ", ")
        case .placement(let size, let nodes, let error):
            "\(byteText(size)) of guest memory could not be allocated on the host's \(nodeText(nodes)) (\(error)); "
                + "nodes without memory or outside this process's cpuset provide none"
        case .refused(let size, let error):
            "\(byteText(size)) of guest memory could not be allocated (\(error)); "
                + "request less, or check `ulimit -v` and vm.overcommit_memory"
        case .prealloc(let size, let error):
            "\(byteText(size)) of guest memory could not be preallocated (\(error)); "
                + "request less, or check the memory limits of this process's control group"
        case .controlGroup(let size, let overhead, let limit, let directory):
            "\(byteText(size)) of preallocated guest memory and about \(roundedText(overhead)) of overhead exceed the limit of the control "
                + "group \(directory) (\(roundedText(limit))): raise its memory limit, or request less"
        case .interrupted:
            "the preallocation of guest memory was interrupted"
        case .outOfRange(let address, let count):
            "\(count) bytes at guest-physical \(address) are not in one region of guest RAM"
        }
    }
}

/// The figures of a pool of huge pages that cannot serve a guest.
public struct HugePageShortage: Equatable, Sendable, CustomStringConvertible {
    /// Bytes of guest memory requested.
    public let size: UInt64
    /// Bytes in one page.
    public let pageSize: UInt64
    /// Pages that are neither in use nor reserved.
    public let free: UInt64
    /// Pages that the pool would need in all.
    public let suggestedTotal: UInt64
    /// Indicates whether `vm.nr_hugepages` is this size's pool (it is that of the kernel's default size).
    public let isDefaultSize: Bool

    public var description: String {
        let command =
            isDefaultSize
            ? "sysctl vm.nr_hugepages=\(suggestedTotal)"
            : "echo \(suggestedTotal) > \(HugePagePool.directory(pageSize: pageSize))/nr_hugepages"
        return
            "\(byteText(size)) in \(byteText(pageSize)) pages needs \(size / pageSize) huge pages, \(free) are free: `\(command)`"
    }
}

/// An exact size in the largest binary unit that divides it: `2 GiB`, `1536 MiB`, `513 bytes`.
package func byteText(_ size: UInt64) -> String {
    // Not a loop over a table: Swift 6.3 orders two of its instructions one way or the other, so builds would differ.
    switch size == 0 ? 0 : size.trailingZeroBitCount {
    case 40...: "\(size >> 40) TiB"
    case 30...: "\(size >> 30) GiB"
    case 20...: "\(size >> 20) MiB"
    case 10...: "\(size >> 10) KiB"
    default: "\(size) bytes"
    }
}

/// `node 1`, `nodes 0 and 1`.
private func nodeText(_ nodes: [Int]) -> String {
    (nodes.count == 1 ? "node " : "nodes ")
        + nodes.map(String.init).joined(separator: nodes.count == 2 ? " and " : ", ")
}

/// A measured size in whole MiB.
func roundedText(_ size: UInt64) -> String { "\(size >> 20) MiB" }
