// SPDX-License-Identifier: Apache-2.0

import GDBRemote

@testable import GDBRemote

/// Two processors of a machine that does nothing, with 4 KiB of memory from 0x1000 on.
final class FakeTarget: DebugTarget {
    static let memoryStart: UInt64 = 0x1000

    var memory = [UInt8](repeating: 0, count: 4096)
    var files = [RegisterFile(), RegisterFile()]
    var breakpoints: [Breakpoint] = []
    /// The calls that change whether it runs, in their order.
    var calls: [String] = []
    var plan: [ResumeAction] = []
    var commands: [String] = []

    var threadCount: Int { files.count }

    func describe(thread: Int) -> String { "vCPU \(thread - 1)" }

    func registers(of thread: Int) throws(DebugTargetError) -> RegisterFile { files[thread - 1] }

    func setRegisters(_ file: RegisterFile, changing numbers: [Int], of thread: Int) throws(DebugTargetError) {
        if numbers.contains(RegisterSet.segments) { throw .refused }
        files[thread - 1] = file
    }

    func readMemory(at address: UInt64, count: Int, thread: Int) throws(DebugTargetError) -> [UInt8] {
        let offset = address &- Self.memoryStart
        guard offset < UInt64(memory.count) else { throw .unmapped }
        return Array(memory[Int(offset)...].prefix(count))
    }

    func writeMemory(_ bytes: [UInt8], at address: UInt64, thread: Int) throws(DebugTargetError) {
        let offset = address &- Self.memoryStart
        guard offset < UInt64(memory.count), UInt64(bytes.count) <= UInt64(memory.count) - offset else {
            throw .unmapped
        }
        memory.replaceSubrange(Int(offset)..<Int(offset) + bytes.count, with: bytes)
    }

    func insert(_ breakpoint: Breakpoint, thread: Int) throws(DebugTargetError) {
        if breakpoint.kind == .readWatch { throw .unsupported }
        if breakpoints.count == 4 { throw .noRoom }
        breakpoints.append(breakpoint)
    }

    func remove(_ breakpoint: Breakpoint) throws(DebugTargetError) { breakpoints.removeAll { $0 == breakpoint } }

    func resume(_ actions: [ResumeAction]) {
        plan = actions
        calls.append("resume")
    }

    func interrupt() { calls.append("interrupt") }
    func detach() { calls.append("detach") }
    func kill() { calls.append("kill") }

    func monitor(_ command: String, thread: Int) -> String {
        commands.append(command)
        return "heard \(command)\n"
    }
}

/// A session with a fake target, spoken to in packets.
struct Conversation {
    let target = FakeTarget()
    var session: DebugSession<FakeTarget>

    init() { session = DebugSession(target, stop: DebugStop(thread: 1, reason: .interrupt)) }

    /// Sends bytes as they are, and takes the answer's.
    mutating func raw(_ bytes: [UInt8]) -> [UInt8] {
        session.receive(bytes)
        defer { session.output = [] }
        return session.output
    }

    /// Sends one packet; the answer is the data of the packet that comes back, nil when none does.
    mutating func ask(_ text: String) -> String? { answer(in: raw(packet(Array(text.utf8)))) }

    mutating func takeOutput() -> String? {
        defer { session.output = [] }
        return answer(in: session.output)
    }

    /// The last packet among these bytes, whose checksum must be right.
    private func answer(in bytes: [UInt8]) -> String? {
        var reader = PacketReader()
        var last: String?
        for byte in bytes {
            if case .packet(let data) = reader.take(byte) { last = String(decoding: data, as: UTF8.self) }
        }
        return last
    }
}
