// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Linux

/// The policy that selects the host NUMA nodes of memory (set_mempolicy(2)).
public struct MemoryPolicy: Sendable, Equatable {
    public enum Mode: String, Sendable, CaseIterable {
        /// Memory from these nodes only.
        case bind
        /// Memory from one node while it has some, then from others.
        case preferred
        /// One page after the other from each of these nodes in turn.
        case interleave
    }

    public var mode: Mode
    /// Numbers of the host's nodes, at least one; one for ``Mode/preferred``.
    public var hostNodes: Set<Int>

    public init(_ mode: Mode, hostNodes: Set<Int>) { (self.mode, self.hostNodes) = (mode, hostNodes) }

    fileprivate var kernelMode: Int32 {
        switch mode {
        case .bind: Int32(MPOL_BIND)
        case .preferred: Int32(MPOL_PREFERRED)
        case .interleave: Int32(MPOL_INTERLEAVE)
        }
    }
}

extension GuestMemory {
    /// Sets the host's nodes from which a range of the memory is allocated; before it is first accessed.
    ///
    /// Huge pages that must come from certain nodes are allocated immediately: the kernel reserves them for the host as
    /// a whole, and a guest that later touches one that its node does not have would be killed by SIGBUS.
    /// - Parameters:
    ///   - offset: bytes from the first, lower memory before higher, as ``MemoryRegion/offset`` counts them; a multiple
    ///     of the page size.
    ///   - count: bytes, a multiple of the page size.
    ///   - isInterrupted: polled while pages are allocated: whether to cancel.
    ///   - progress: gets, while pages are taken, the bytes that are done and those in all.
    /// - Throws: ``GuestMemoryError/noHostNode(_:online:)``, ``GuestMemoryError/hostNodesTooSmall(size:nodes:total:)``,
    ///   ``GuestMemoryError/hugePagesOfNodes(size:pageSize:nodes:free:)``,
    ///   ``GuestMemoryError/placement(size:nodes:_:)``.
    public func place(
        offset: UInt64, count: UInt64, by policy: MemoryPolicy,
        isInterrupted: @escaping @Sendable () -> Bool = { false },
        progress: Progress? = nil
    ) throws(GuestMemoryError) {
        for part in [offset, count] where part % backing.pageSize != 0 {
            throw .notPageMultiple(size: part, pageSize: backing.pageSize)
        }
        precondition(offset <= size && count <= size - offset, "a run beyond the memory's end")
        guard count > 0 else { return }
        let nodes = policy.hostNodes.sorted()
        try HostNodes().check(nodes, for: count, isBinding: policy.mode == .bind)
        let isTakenNow: Bool
        if case .hugePages(let page) = backing, policy.mode != .preferred {
            let free = nodes.reduce(0) { $0 &+ HostNodes.freeHugePages(ofNode: $1, page) }
            guard count / page.bytes <= free else {
                throw .hugePagesOfNodes(size: count, pageSize: page.bytes, nodes: nodes, free: free)
            }
            isTakenNow = true
        } else {
            isTakenNow = false
        }
        var mask = [UInt](repeating: 0, count: (nodes.last ?? 0) / UInt.bitWidth + 1)
        for node in nodes { mask[node / UInt.bitWidth] |= 1 << UInt(node % UInt.bitWidth) }
        // The run lies within the mapping, and the mask has the bits that are counted.
        let result = unsafe clinux_mbind(
            regions[0].host + Int(offset), Int(count), policy.kernelMode, mask, UInt(mask.count * UInt.bitWidth))
        guard result == 0 else { throw .placement(size: count, nodes: nodes, .last("mbind")) }
        if isTakenNow { try prealloc(offset: offset, count: count, isInterrupted: isInterrupted, progress: progress) }
    }
}

/// The host's NUMA nodes, as /sys/devices/system/node has them.
struct HostNodes {
    private static let directory = "/sys/devices/system/node"
    /// As the kernel writes it: `0-1,3`; empty if it does not report it.
    let online: String

    init() {
        let text = (try? readFile("\(Self.directory)/online", limit: 4096)) ?? []
        online = String(decoding: text.prefix { $0 > UInt8(ascii: " ") }, as: UTF8.self)
    }

    /// Throws what stands against memory from these nodes.
    func check(_ nodes: [Int], for size: UInt64, isBinding: Bool) throws(GuestMemoryError) {
        for node in nodes where !Self.contains(node, in: online) { throw .noHostNode(node, online: online) }
        let total = nodes.reduce(0) { $0 &+ Self.memory(ofNode: $1) }
        // It could only end in the kernel's killing the machine.
        if isBinding, size > total { throw .hostNodesTooSmall(size: size, nodes: nodes, total: total) }
    }

    /// Indicates whether a list such as `0-1,3` has a number in it.
    static func contains(_ number: Int, in list: String) -> Bool {
        list.split(separator: ",").contains { range in
            let bounds = range.split(separator: "-").map { Int($0) }
            guard let first = bounds.first ?? nil, let last = bounds.last ?? nil, first <= last else { return false }
            return (first...last).contains(number)
        }
    }

    /// Bytes of RAM.
    private static func memory(ofNode node: Int) -> UInt64 {
        let lines = ((try? readFile("\(directory)/node\(node)/meminfo", limit: 64 << 10)) ?? []).split(
            separator: UInt8(ascii: "\n"))
        return lines.lazy.compactMap { kilobytes(in: $0, of: "Node \(node) MemTotal:") }.first ?? 0
    }

    static func freeHugePages(ofNode node: Int, _ page: HugePageSize) -> UInt64 {
        let path = "\(directory)/node\(node)/hugepages/hugepages-\(page.bytes >> 10)kB/free_hugepages"
        return decimal(((try? readFile(path, limit: 64)) ?? [])[...]) ?? 0
    }
}
