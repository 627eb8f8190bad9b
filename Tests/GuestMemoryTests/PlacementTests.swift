// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

@testable import GuestMemory

@Suite(.timed, .enabled(if: !HostNodes().online.isEmpty, "the host's kernel knows of no NUMA nodes (CONFIG_NUMA)"))
struct PlacementTests {
    /// The kernel's word for the policy of each mapping in a run of the memory (/proc/self/numa_maps).
    private func policies(_ memory: GuestMemory, _ run: Range<UInt64>) throws -> [String] {
        let text = String(decoding: try readFile("/proc/self/numa_maps", limit: 16 << 20), as: UTF8.self)
        let start = unsafe UInt64(UInt(bitPattern: memory.regions[0].host))
        return text.split(separator: "\n").compactMap { line in
            let words = line.split(separator: " ", maxSplits: 2)
            guard let address = UInt64(words[0], radix: 16),
                (start + run.lowerBound..<start + run.upperBound).contains(address)
            else { return nil }
            return String(words[1])
        }
    }

    @Test(
        arguments: [(MemoryPolicy.Mode.bind, "bind:0"), (.preferred, "prefer:0"), (.interleave, "interleave:0")],
        [false, true])
    func isTheKernelsPolicyForTheRunAndNoOther(mode: (MemoryPolicy.Mode, String), shared: Bool) throws {
        let memory = try GuestMemory(size: 48 << 20, shared: shared)
        try memory.place(offset: 16 << 20, count: 16 << 20, by: MemoryPolicy(mode.0, hostNodes: [0]))
        #expect(try policies(memory, 16 << 20..<32 << 20) == [mode.1])
        #expect(
            try policies(memory, 0..<16 << 20) == ["default"] && policies(memory, 32 << 20..<48 << 20) == ["default"])
        // It is memory like any other.
        try memory.ram.write(UInt64(7), at: GuestAddress(16 << 20))
        #expect(try memory.ram.readUInt64(at: GuestAddress(16 << 20)) == 7)
        if !shared { #expect(try memory.usage().resident == 4096) }
    }

    @Test func aNodeThatIsNotThereIsAnErrorThatNamesThoseThatAre() throws {
        let memory = try GuestMemory(size: 16 << 20)
        let online = HostNodes().online
        for mode in MemoryPolicy.Mode.allCases {
            #expect(throws: GuestMemoryError.noHostNode(4000, online: online)) {
                try memory.place(offset: 0, count: 16 << 20, by: MemoryPolicy(mode, hostNodes: [0, 4000]))
            }
        }
        #expect(
            GuestMemoryError.noHostNode(7, online: "0-1").description.hasPrefix(
                "this host has no NUMA node 7, it has 0-1: "))
    }

    @Test func moreThanTheNodesHaveIsRefused() {
        let node = MemoryPolicy(.bind, hostNodes: [0])
        // Nothing is mapped or touched for the check.
        #expect(throws: Never.self) { try HostNodes().check([0], for: 4096, isBinding: true) }
        #expect(throws: GuestMemoryError.self) { try HostNodes().check([0], for: 1 << 60, isBinding: true) }
        #expect(throws: Never.self) { try HostNodes().check([0], for: 1 << 60, isBinding: false) }
        #expect(node.hostNodes == [0])
        #expect(
            GuestMemoryError.hostNodesTooSmall(size: 4 << 30, nodes: [0, 2], total: 1 << 30).description.contains(
                "the 1024 MiB of the host's nodes 0 and 2"))
    }

    @Test(arguments: [
        ("0", 0, true), ("0", 1, false), ("0-3", 3, true), ("0-3", 4, false), ("0,2-3,8", 2, true),
        ("0,2-3,8", 1, false), ("", 0, false), ("3-1", 2, false), ("x", 0, false),
    ])
    func readsTheKernelsLists(list: String, number: Int, isThere: Bool) {
        #expect(HostNodes.contains(number, in: list) == isThere)
    }

    @Test(.enabled(if: geteuid() == 0, "raising the pool of huge pages needs root"))
    func hugePagesOfANodeAreTakenAtOnceOrRefused() throws {
        let turn = try HugePageTurn()
        defer { withExtendedLifetime(turn) {} }
        try withHugePages(additional: 4) {
            let policy = MemoryPolicy(.bind, hostNodes: [0])
            let memory = try GuestMemory(size: 8 << 20, backing: .hugePages(.twoMiB))
            try memory.place(offset: 0, count: 4 << 20, by: policy)
            #expect(try memory.usage().resident == 4 << 20)
            // Reserved for the host as a whole, but free on the node: as many as there are.
            let free = HostNodes.freeHugePages(ofNode: 0, .twoMiB)
            #expect(
                GuestMemoryError.hugePagesOfNodes(size: 8 << 20, pageSize: 2 << 20, nodes: [1], free: 3).description
                    .hasPrefix(
                        "8 MiB in 2 MiB pages of the host's node 1 needs 4 huge pages there, 3 are free: `echo N > /sys/devices/system/node/node1/hugepages/"
                    ))
            #expect(free >= 2)
            #expect(throws: GuestMemoryError.notPageMultiple(size: 4096, pageSize: 2 << 20)) {
                try memory.place(offset: 4096, count: 2 << 20, by: policy)
            }
        }
    }
}
