// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import Testing

/// Several engines of one image, each with a thread and a workload of its own, whose sectors lie between those of the
/// others.
final class EngineCrew: Sendable {
    enum Order: Sendable {
        case rounds(Int, flushes: Bool)
        case flush
        /// The engine goes, with requests in flight.
        case leave
    }

    struct Report: Sendable {
        var history: [(range: Range<Int>, bytes: [UInt8])] = []
        var model: [UInt8] = []
        var operations = 0
        var failure: String?
    }

    /// One of the threads: it takes an order at a time, and serves its engine for the others until the next one.
    private final class Member: Sendable {
        let orders = Guarded<[Order?]>([])
        let wakeup: EventFD
        let answer: EventFD
        let report = Guarded(Report())
        init() throws {
            wakeup = try EventFD()
            answer = try EventFD()
        }

        func send(_ order: Order?) {
            orders.withLock { $0.append(order) }
            wakeup.signal()
        }
    }

    private let members: [Member]
    private let threads: Guarded<[Int: ThreadBox]>
    private let current: Guarded<[UInt8]>
    let count: Int

    private final class ThreadBox: @unchecked Sendable {
        let thread: Linux.Thread
        init(_ thread: consuming Linux.Thread) { self.thread = thread }
    }

    /// What the disk must have.
    var model: [UInt8] { current.withLock { $0 } }

    /// Which engine's a sector is: pieces of one to three sectors in the first half of the disk, large ones in the
    /// second.
    static func owner(_ sector: Int, of sectors: Int, count: Int) -> Int {
        let piece = sector < sectors / 2 ? sector / 3 * 2 + (sector % 3 == 2 ? 1 : 0) : sector / 48
        return Int(truncatingIfNeeded: (UInt64(piece) &* 0x9e37_79b9_7f4a_7c15) >> 40) % count
    }

    /// - Parameter mayFail: requests may end with errors, after which their sectors have what is read there.
    init(_ shared: SharedImage, count: Int, _ contents: [UInt8], seed: UInt64, usesRing: Bool, mayFail: Bool = false) {
        self.count = count
        current = Guarded(contents)
        // Only descriptors that the process has none left of make this fail.
        members = (0..<count).map { _ in try! Member() }
        threads = Guarded([:])
        for (index, member) in members.enumerated() {
            let thread = try! Linux.Thread.start(name: "engine\(index)", stackSize: 8 << 20) {
                do {
                    try Self.work(
                        shared, member, index, count, contents, seed: seed &+ UInt64(index), usesRing: usesRing,
                        mayFail: mayFail)
                } catch {
                    member.report.withLock { $0.failure = "\(error)" }
                    member.answer.signal()
                }
            }
            let box = ThreadBox(thread)
            threads.withLock { $0[index] = box }
        }
    }

    deinit {
        for member in members { member.send(nil) }
        // Joined by their own ends.
        threads.withLock { $0.removeAll() }
    }

    private static func work(
        _ shared: SharedImage, _ member: Member, _ index: Int, _ count: Int, _ contents: [UInt8], seed: UInt64,
        usesRing: Bool,
        mayFail: Bool
    ) throws {
        var engine = try DiskEngine(shared, depth: 8, segments: 8, usesRing: usesRing)
        var workload = Workload(contents, seed: seed, maximum: 16 << 10)
        let sectors = contents.count / 512
        workload.owns = { Self.owner($0, of: sectors, count: count) == index }
        while true {
            // Others may need the engine while it has nothing to do.
            var entries = [
                pollfd(fd: member.wakeup.rawValue, events: Int16(POLLIN), revents: 0),
                pollfd(fd: engine.descriptor, events: Int16(POLLIN), revents: 0),
            ]
            _ = unsafe poll(&entries, 2, -1)
            if entries[1].revents != 0 { #expect(engine.nextCompletion() == nil) }
            guard entries[0].revents != 0 else { continue }
            member.wakeup.drain()
            while let order = member.orders.withLock({ $0.isEmpty ? nil : .some($0.removeFirst()) }) {
                switch order {
                case .rounds(let rounds, let flushes):
                    for round in 0..<rounds {
                        try workload.round(&engine, mayFail: mayFail)
                        try workload.learn(&engine)
                        if flushes, round % 5 == index % 5 { try flush(&engine, mayFail: mayFail) }
                    }
                case .flush: try flush(&engine, mayFail: mayFail)
                case .leave:
                    workload.leave(engine)
                    return answer(member, &workload)
                case nil: return
                }
                answer(member, &workload)
            }
        }
    }

    private static func flush(_ engine: inout DiskEngine, mayFail: Bool) throws {
        do { try engine.perform(.flush) } catch { if !mayFail { throw error } }
    }

    private static func answer(_ member: Member, _ workload: inout Workload) {
        member.report.withLock {
            $0 = Report(history: workload.history, model: workload.model, operations: workload.operations)
        }
        workload.history = []
        member.answer.signal()
    }

    /// Has each engine do as many rounds at the same time; returns what came to which sectors.
    @discardableResult
    func run(
        rounds: Int, flushes: Bool = false, besides leaving: Int? = nil
    ) throws -> [(range: Range<Int>, bytes: [UInt8])] {
        for index in members.indices where index != leaving { members[index].send(.rounds(rounds, flushes: flushes)) }
        if let leaving { members[leaving].send(.leave) }
        return gather(Array(members.indices))
    }

    /// A flush by one engine.
    func flush(_ index: Int) {
        members[index].send(.flush)
        gather([index])
    }

    /// Operations of all.
    var operations: Int { members.reduce(0) { $0 + $1.report.withLock { $0.operations } } }

    @discardableResult
    private func gather(_ indices: [Int]) -> [(range: Range<Int>, bytes: [UInt8])] {
        var history: [(range: Range<Int>, bytes: [UInt8])] = []
        for index in indices {
            members[index].answer.wait()
            let report = members[index].report.withLock { $0 }
            #expect(report.failure == nil)
            history += report.history
            guard !report.model.isEmpty else { continue }
            current.withLock { current in
                let sectors = current.count / 512
                for sector in 0..<sectors where Self.owner(sector, of: sectors, count: count) == index {
                    current.replaceSubrange(
                        sector * 512..<(sector + 1) * 512, with: report.model[sector * 512..<(sector + 1) * 512])
                }
            }
        }
        return history
    }
}
