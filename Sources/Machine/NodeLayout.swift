// SPDX-License-Identifier: Apache-2.0

internal import Boot
internal import GuestMemory

/// The guest's NUMA topology, checked: which CPUs and which memory each node has, and the APIC IDs that go with it.
///
/// A node is a socket of its own, so that no cache and no core seems to be shared between nodes. Without nodes the
/// machine is one socket.
struct NodeLayout {
    /// Local APIC IDs in the order of the CPUs' numbers. The boot processor's is 0.
    let localAPICIDs: [UInt32]
    /// Cores of each socket that has any.
    let sockets: [Int]
    /// The nodes' CPUs and memory, in their order; empty without nodes.
    let nodes: [ACPIDescription.Node]
    /// From row to column; empty without nodes.
    let distances: [[UInt8]]

    /// Bits of an APIC ID that distinguish the cores of a socket.
    var coreBits: UInt32 { Self.bits(for: sockets.max() ?? 1) }

    /// How many CPUs share the socket of an APIC ID.
    func cores(besides id: UInt32) -> Int { localAPICIDs.count { $0 >> coreBits == id >> coreBits } }

    /// - Parameter configuration: with nodes that ``check(_:)`` has nothing against, and no more CPUs than KVM allows.
    init(_ configuration: Configuration, _ regions: [MemoryRegion]) {
        let cpus = configuration.cpus, wanted = configuration.nodes
        guard !wanted.isEmpty else {
            localAPICIDs = (0..<UInt32(cpus)).map { $0 }
            sockets = [cpus]
            nodes = []
            distances = []
            return
        }
        // The boot processor's socket first, so that its APIC ID is 0.
        let occupied = wanted.map { Set($0.cpus).sorted() }.filter { !$0.isEmpty }.sorted { $0[0] < $1[0] }
        let bits = Self.bits(for: occupied.map(\.count).max() ?? 1)
        var ids = [UInt32](repeating: 0, count: cpus)
        for (socket, members) in occupied.enumerated() {
            for (core, cpu) in members.enumerated() { ids[cpu] = UInt32(socket) << bits | UInt32(core) }
        }
        localAPICIDs = ids
        sockets = occupied.map(\.count)
        var offset: UInt64 = 0
        nodes = wanted.map { node in
            defer { offset &+= node.memory }
            return ACPIDescription.Node(
                cpus: node.cpus.sorted(), memory: Self.addresses(offset..<offset &+ node.memory, regions))
        }
        distances = wanted.indices.map { row in
            wanted.indices.map { column in
                row == column ? 10 : wanted[row].distances[column] ?? wanted[column].distances[row] ?? 20
            }
        }
    }

    private static func bits(for count: Int) -> UInt32 {
        UInt32(count <= 1 ? 0 : Int.bitWidth - (count - 1).leadingZeroBitCount)
    }

    /// Where bytes of the memory, counted from its first, are in the guest.
    private static func addresses(_ bytes: Range<UInt64>, _ regions: [MemoryRegion]) -> [Range<UInt64>] {
        regions.compactMap { region in
            let own = bytes.clamped(to: region.offset..<region.offset &+ region.size)
            guard !own.isEmpty else { return nil }
            let start = region.start.rawValue &+ (own.lowerBound &- region.offset)
            return start..<start &+ UInt64(own.count)
        }
    }

    /// Compares the nodes with each other and with the machine.
    /// - Throws: ``MachineError/nodes(_:)``.
    static func check(_ configuration: Configuration) throws(MachineError) {
        let nodes = configuration.nodes, cpus = configuration.cpus
        if nodes.isEmpty { return }
        guard nodes.count <= NodeProblem.maximum else { throw .nodes(.tooMany(nodes.count)) }
        var owner: [Int: Int] = [:]
        for (number, node) in nodes.enumerated() {
            guard node.memory > 0 else { throw .nodes(.noMemory(node: number)) }
            for cpu in node.cpus {
                guard (0..<cpus).contains(cpu) else { throw .nodes(.noSuchCPU(node: number, cpu: cpu, cpus: cpus)) }
                if let other = owner.updateValue(number, forKey: cpu) {
                    throw .nodes(.sharedCPU(cpu: cpu, node: other, other: number))
                }
            }
            for (other, distance) in node.distances {
                guard nodes.indices.contains(other), other != number else {
                    throw .nodes(.noSuchNode(node: number, other: other, nodes: nodes.count))
                }
                guard NodeProblem.distances.contains(Int(distance)) else {
                    throw .nodes(.badDistance(node: number, other: other, Int(distance)))
                }
            }
        }
        if let cpu = (0..<cpus).first(where: { owner[$0] == nil }) { throw .nodes(.homelessCPU(cpu)) }
        var sum: UInt64 = 0
        for node in nodes { sum = sum.addingReportingOverflow(node.memory).overflow ? .max : sum &+ node.memory }
        guard sum == configuration.memory.size else { throw .nodes(.memory(sum: sum, size: configuration.memory.size)) }
        let page = configuration.memory.backing.pageSize
        for (number, node) in nodes.enumerated() where node.memory % page != 0 {
            throw .nodes(.notPageMultiple(node: number, size: node.memory, pageSize: page))
        }
    }
}

/// A contradiction in a configuration's NUMA nodes. Nodes are numbered from 0 in the order given.
public enum NodeProblem: Sendable, Equatable, CustomStringConvertible {
    case tooMany(Int)
    case noMemory(node: Int)
    case noSuchCPU(node: Int, cpu: Int, cpus: Int)
    case sharedCPU(cpu: Int, node: Int, other: Int)
    /// A CPU in no node.
    case homelessCPU(Int)
    /// A distance to a node that is not there, or to itself.
    case noSuchNode(node: Int, other: Int, nodes: Int)
    case badDistance(node: Int, other: Int, Int)
    /// Bytes of all nodes together, and of the machine.
    case memory(sum: UInt64, size: UInt64)
    case notPageMultiple(node: Int, size: UInt64, pageSize: UInt64)

    /// The maximum number of nodes, that of Linux distributions.
    public static let maximum = 64
    /// The valid distances to another node (ACPI 6.5 §5.2.17); 10 is the node itself, 255 is unreachable.
    public static let distances = 11...254

    public var description: String {
        switch self {
        case .tooMany(let count):
            "\(count) NUMA nodes were requested, but the maximum is \(Self.maximum): remove \(count - Self.maximum)"
        case .noMemory(let node): "NUMA node \(node) has no memory: give it some with mem=SIZE"
        case .noSuchCPU(let node, let cpu, let cpus):
            "NUMA node \(node) has CPU \(cpu), the machine has 0 to \(cpus - 1): give `--cpus \(cpu &+ 1)`, or another number"
        case .sharedCPU(let cpu, let node, let other):
            "CPU \(cpu) is in the NUMA nodes \(node) and \(other): name it in one of them"
        case .homelessCPU(let cpu): "CPU \(cpu) is in no NUMA node: name it in one, cpus=\(cpu)"
        case .noSuchNode(let node, let other, let nodes):
            "NUMA node \(node) has a distance to node \(other); expected another one of the nodes 0 to \(nodes - 1)"
        case .badDistance(let node, let other, let distance):
            "the distance of \(distance) from NUMA node \(node) to \(other) is out of range; expected \(Self.distances.lowerBound) to \(Self.distances.upperBound)"
        case .memory(let sum, let size):
            "the NUMA nodes have \(byteText(sum)) in all, the machine \(byteText(size)): give `--mem \(sum % 1024 == 0 ? byteText(sum).filter { $0 != " " } : String(sum))`, or other sizes"
        case .notPageMultiple(let node, let size, let pageSize):
            "the \(byteText(size)) of NUMA node \(node) are not a multiple of the memory's \(byteText(pageSize)) pages"
        }
    }
}
