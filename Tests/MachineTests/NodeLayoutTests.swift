// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import TestSupport
import Testing

@testable import Machine

@Suite(.timed) struct NodeLayoutTests {
    private typealias Node = Configuration.Node

    private func layout(cpus: Int, _ nodes: [Node], size: UInt64? = nil) throws -> NodeLayout {
        let size = size ?? nodes.reduce(0) { $0 + $1.memory }
        let memory = try GuestMemory(size: size)
        let configuration = Configuration(cpus: cpus, memory: .init(size: size), nodes: nodes)
        try NodeLayout.check(configuration)
        return NodeLayout(configuration, memory.regions)
    }

    private func problem(
        cpus: Int, _ nodes: [Node], size: UInt64 = 128 << 20, backing: MemoryBacking = .anonymous
    ) -> NodeProblem? {
        do throws(MachineError) {
            try NodeLayout.check(Configuration(cpus: cpus, memory: .init(size: size, backing: backing), nodes: nodes))
        } catch {
            if case .nodes(let problem) = error { return problem }
        }
        return nil
    }

    private let half: UInt64 = 64 << 20

    @Test(arguments: [1, 2, 3, 8, 300]) func withoutNodesThereIsOneSocket(cpus: Int) throws {
        let layout = try layout(cpus: cpus, [], size: 64 << 20)
        #expect(layout.localAPICIDs == (0..<UInt32(cpus)).map { $0 } && layout.sockets == [cpus])
        #expect(layout.nodes.isEmpty && layout.distances.isEmpty)
        #expect(cpus <= 1 << Int(layout.coreBits) && layout.cores(besides: 0) == cpus)
    }

    @Test func aNodeIsASocket() throws {
        let layout = try layout(cpus: 4, [Node(cpus: [0, 1], memory: half), Node(cpus: [3, 2], memory: half)])
        #expect(layout.localAPICIDs == [0, 1, 2, 3] && layout.sockets == [2, 2] && layout.coreBits == 1)
        #expect(layout.nodes.map(\.cpus) == [[0, 1], [2, 3]])
        #expect(layout.distances == [[10, 20], [20, 10]])
    }

    /// Cores of a socket share the upper bits of their IDs and nobody else has them; the boot processor's is 0.
    @Test func socketsOfDifferentSizes() throws {
        let layout = try layout(
            cpus: 6,
            [
                Node(cpus: [5], memory: half), Node(cpus: [], memory: half), Node(cpus: [4, 0, 2], memory: half),
                Node(cpus: [1, 3], memory: half),
            ])
        #expect(layout.coreBits == 2)
        #expect(layout.localAPICIDs == [0, 4, 1, 5, 2, 8])
        #expect(layout.sockets == [3, 2, 1])
        #expect(layout.localAPICIDs.map { layout.cores(besides: $0) } == [3, 2, 3, 2, 3, 1])
        #expect(layout.nodes.map(\.cpus) == [[5], [], [0, 2, 4], [1, 3]])
    }

    @Test func memoryGoesOnBeyondTheHole() throws {
        let gib: UInt64 = 1 << 30
        let layout = try layout(
            cpus: 1, [Node(cpus: [0], memory: 2 * gib), Node(cpus: [], memory: 2 * gib), Node(cpus: [], memory: gib)])
        #expect(
            layout.nodes.map(\.memory) == [[0..<2 * gib], [2 * gib..<3 * gib, 4 * gib..<5 * gib], [5 * gib..<6 * gib]])
    }

    @Test func aDistanceGoesBothWaysUnlessTheOtherIsGiven() throws {
        let nodes = [
            Node(cpus: [0], memory: half, distances: [1: 15, 2: 30]), Node(cpus: [], memory: half),
            Node(cpus: [], memory: half, distances: [0: 40]),
        ]
        #expect(try layout(cpus: 1, nodes).distances == [[10, 15, 30], [15, 10, 20], [40, 20, 10]])
    }

    @Test func contradictionsHaveASentenceEach() {
        func two(_ first: [Int], _ second: [Int], _ distances: [Int: UInt8] = [:]) -> [Node] {
            [Node(cpus: first, memory: half, distances: distances), Node(cpus: second, memory: half)]
        }
        #expect(problem(cpus: 2, two([0], [1])) == nil)
        #expect(problem(cpus: 2, two([0], [2])) == .noSuchCPU(node: 1, cpu: 2, cpus: 2))
        #expect(problem(cpus: 2, two([-1, 0], [1])) == .noSuchCPU(node: 0, cpu: -1, cpus: 2))
        #expect(problem(cpus: 2, two([0, 1], [1])) == .sharedCPU(cpu: 1, node: 0, other: 1))
        #expect(
            problem(cpus: 2, two([0], [])) == .homelessCPU(1) && problem(cpus: .max, two([0], [1])) == .homelessCPU(2))
        #expect(problem(cpus: 2, two([0], [1], [0: 20])) == .noSuchNode(node: 0, other: 0, nodes: 2))
        #expect(problem(cpus: 2, two([0], [1], [2: 20])) == .noSuchNode(node: 0, other: 2, nodes: 2))
        #expect(problem(cpus: 2, two([0], [1], [1: 10])) == .badDistance(node: 0, other: 1, 10))
        #expect(problem(cpus: 2, two([0], [1], [1: 255])) == .badDistance(node: 0, other: 1, 255))
        #expect(
            problem(cpus: 1, [Node(cpus: [0], memory: half), Node(cpus: [], memory: 0)], size: half)
                == .noMemory(node: 1))
        #expect(problem(cpus: 2, two([0], [1]), size: 512 << 20) == .memory(sum: 128 << 20, size: 512 << 20))
        #expect(
            problem(cpus: 1, [Node(cpus: [0], memory: .max), Node(cpus: [], memory: .max)])
                == .memory(sum: .max, size: 128 << 20))
        #expect(problem(cpus: 65, (0..<65).map { Node(cpus: [$0], memory: 4096) }) == .tooMany(65))
        let odd = [Node(cpus: [0], memory: half + 4096), Node(cpus: [], memory: half - 4096)]
        #expect(problem(cpus: 1, odd) == nil)
        #expect(
            problem(cpus: 1, odd, backing: .hugePages(.twoMiB))
                == .notPageMultiple(node: 0, size: half + 4096, pageSize: 2 << 20))

        #expect(
            NodeProblem.memory(sum: 2 << 30, size: 512 << 20).description
                == "the NUMA nodes have 2 GiB in all, the machine 512 MiB: give `--mem 2GiB`, or other sizes")
        #expect(NodeProblem.homelessCPU(3).description == "CPU 3 is in no NUMA node: name it in one, cpus=3")
    }
}
