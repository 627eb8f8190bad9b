// SPDX-License-Identifier: Apache-2.0

import GDBRemote

extension FuzzTarget {
    /// What a debugger sends. An even first byte: each line of the input is the data of a packet with a right checksum;
    /// an odd one: the bytes as they are.
    static let debugger = FuzzTarget(name: "gdb", seeds: conversations) { bytes in
        guard let kind = bytes.first else { return false }
        let target = ScriptedTarget()
        var session = DebugSession(target, stop: DebugStop(thread: 1, reason: .interrupt))
        var answered = 0
        let rest = bytes.dropFirst().prefix(8192)
        let pieces = kind % 2 == 0 ? rest.split(separator: 0x0a).map { framed($0) } : [Array(rest)]
        for piece in pieces {
            session.receive(piece)
            precondition(session.output.count <= 1 << 20, "an answer of \(session.output.count) bytes")
            if session.output.contains(UInt8(ascii: "$")) { answered += 1 }
            session.output = []
            // What a machine does when it is asked to go on.
            if session.isRunning { session.stopped(DebugStop(thread: 2, reason: .softwareBreakpoint)) }
            if session.isFinished { return false }
        }
        session.ended(.status(0))
        return answered > 0
    }

    private static func framed(_ data: some Collection<UInt8>) -> [UInt8] {
        let sum = data.reduce(UInt8(0), &+), digits = Array("0123456789abcdef".utf8)
        return [UInt8(ascii: "$")] + data + [UInt8(ascii: "#"), digits[Int(sum >> 4)], digits[Int(sum & 15)]]
    }

    private static let conversations: [[UInt8]] = [
        [0]
            + Array(
                "qSupported:swbreak+;hwbreak+\n?\nHg1\ng\nm1000,40\nZ0,1000,1\nvCont?\nvCont;c:1\nqC\nqfThreadInfo\nz0,1000,1"
                    .utf8),
        [0]
            + Array(
                "QStartNoAckMode\nP10=0102030405060708\np10\nM1000,2:0102\nX1000,2:ab\nqXfer:features:read:target.xml:0,fff\nqRcmd,68656c70\nqThreadExtraInfo,2\ns1000\nC05\nT2"
                    .utf8),
        [1] + Array("+$qC#b4+$m1000,8#8f-\u{3}".utf8),
    ]
}

/// Two threads that do nothing, with a page of memory.
private final class ScriptedTarget: DebugTarget {
    private var memory = [UInt8](repeating: 0x90, count: 4096)
    private var files = [RegisterFile(), RegisterFile()]
    private var breakpoints = Set<Breakpoint>()

    let threadCount = 2

    private func index(_ thread: Int) -> Int {
        precondition((1...2).contains(thread), "thread \(thread)")
        return thread - 1
    }

    func describe(thread: Int) -> String { "vCPU \(index(thread))" }
    func registers(of thread: Int) throws(DebugTargetError) -> RegisterFile { files[index(thread)] }

    func setRegisters(_ file: RegisterFile, changing numbers: [Int], of thread: Int) throws(DebugTargetError) {
        files[index(thread)] = file
    }

    func readMemory(at address: UInt64, count: Int, thread: Int) throws(DebugTargetError) -> [UInt8] {
        precondition(count > 0 && index(thread) >= 0)
        let offset = address &- 0x1000
        guard offset < UInt64(memory.count) else { throw .unmapped }
        return Array(memory[Int(offset)...].prefix(count))
    }

    func writeMemory(_ bytes: [UInt8], at address: UInt64, thread: Int) throws(DebugTargetError) {
        precondition(index(thread) >= 0)
        let offset = address &- 0x1000
        guard offset < UInt64(memory.count), UInt64(bytes.count) <= UInt64(memory.count) - offset else {
            throw .unmapped
        }
        memory.replaceSubrange(Int(offset)..<Int(offset) + bytes.count, with: bytes)
    }

    func insert(_ breakpoint: Breakpoint, thread: Int) throws(DebugTargetError) {
        if breakpoints.count >= 4 { throw .noRoom }
        breakpoints.insert(breakpoint)
    }

    func remove(_ breakpoint: Breakpoint) throws(DebugTargetError) { breakpoints.remove(breakpoint) }
    func resume(_ actions: [ResumeAction]) { precondition(actions.count == threadCount) }
    func interrupt() {}
    func detach() {}
    func kill() {}
    func monitor(_ command: String, thread: Int) -> String { "\(index(thread)) \(command.utf8.count)\n" }
}
