// SPDX-License-Identifier: Apache-2.0

/// The session of one debugger: decodes its packets, drives the target, encodes the replies ("Remote Serial Protocol"
/// in the manual of GDB).
///
/// It does no I/O: the owner of the connection gives it what has come and sends ``output``. The session begins with
/// all threads stopped. All-stop mode: a stop of one thread stops all of them, and packets that come while threads run
/// wait for that.
public struct DebugSession<Target: DebugTarget> {
    /// Indicates whether threads run, so that ``stopped(_:)`` is due.
    public private(set) var isRunning = false
    /// Indicates the end of the session: close the connection when ``output`` is sent.
    public private(set) var isFinished = false
    /// Indicates whether the client has sent what is no packet: the session has ended for that.
    public private(set) var isForeign = false
    /// The bytes to send; the sender removes them.
    public var output: [UInt8] = []

    private let target: Target
    private var reader = PacketReader()
    private var isAcknowledging = true
    /// The last packet, for a debugger that wants it again.
    private var lastPacket: [UInt8] = []
    private var lastStop: DebugStop
    private var features = Set<String>()
    /// The threads that `g`, `m` and their kind, and `c` and `s` are about.
    private var selected: Int
    private var resumed: ThreadName = .any
    /// Requests that came while the target was running.
    private var waiting: [[UInt8]] = []
    private static var waitingLimit: Int { 16 }

    /// - Parameter stop: why the target is stopped now.
    public init(_ target: Target, stop: DebugStop) {
        self.target = target
        lastStop = stop
        selected = stop.thread
    }

    /// Indicates whether a debugger may begin with this byte: GDB and LLDB send `+`, or a packet.
    public static func canBegin(with byte: UInt8) -> Bool {
        [UInt8(ascii: "+"), UInt8(ascii: "-"), UInt8(ascii: "$"), 3].contains(byte)
    }

    // MARK: Events

    /// Takes what the debugger has sent.
    public mutating func receive(_ bytes: some Sequence<UInt8>) {
        for byte in bytes {
            guard !isFinished else { return }
            switch reader.take(byte) {
            case nil, .acknowledged: break
            case .rejected: if isAcknowledging { output += lastPacket }
            case .damaged: if isAcknowledging { output.append(UInt8(ascii: "-")) }
            case .tooLong:
                acknowledge()
                answer(error: .tooLong)
            case .interrupt: if isRunning { target.interrupt() }
            case .foreign:
                isForeign = true
                isFinished = true
            case .packet(let data):
                acknowledge()
                if !isRunning {
                    handle(data)
                } else if waiting.count < Self.waitingLimit {
                    waiting.append(data)
                } else {
                    // No debugger does that.
                    isFinished = true
                }
            }
        }
    }

    /// All threads have stopped.
    public mutating func stopped(_ stop: DebugStop) {
        guard isRunning, !isFinished else { return }
        isRunning = false
        lastStop = stop
        selected = stop.thread
        // Sent while the target still counts as running, as console output is.
        if case .failure(let sentence) = stop.reason {
            answer([UInt8(ascii: "O")] + Hexadecimal.encode("swkvm: \(sentence)\n".utf8))
        }
        answer(stopReply)
        while !isRunning, !isFinished, !waiting.isEmpty { handle(waiting.removeFirst()) }
    }

    /// The machine has ended.
    public mutating func ended(_ end: DebugEnd) {
        guard !isFinished else { return }
        // A debugger that waits for nothing notices the end of the connection.
        if isRunning {
            switch end {
            case .status(let status): answer("W" + Self.twoDigits(status))
            case .signal(let number): answer("X" + Self.twoDigits(number))
            }
        }
        isFinished = true
    }

    // MARK: Answers

    /// Numbers of `E` answers, which GDB shows and nothing more.
    private enum ErrorNumber: UInt8 {
        case tooLong = 7
        case unmapped = 14
        case refused = 22
        case noRoom = 28
    }

    private mutating func acknowledge() {
        if isAcknowledging { output.append(UInt8(ascii: "+")) }
    }

    private mutating func answer(_ data: some Collection<UInt8>) {
        lastPacket = packet(data)
        output += lastPacket
    }

    private mutating func answer(_ text: String) { answer(Array(text.utf8)) }

    private mutating func answer(error: ErrorNumber) { answer("E" + Self.twoDigits(error.rawValue)) }

    private mutating func answer(_ error: DebugTargetError) {
        switch error {
        case .unmapped: answer(error: .unmapped)
        case .noRoom: answer(error: .noRoom)
        case .refused: answer(error: .refused)
        case .unsupported: answer("")
        }
    }

    /// `OK`, or the error of what is tried with the target and the selected thread.
    private mutating func attempt(_ body: (Target, _ thread: Int) throws(DebugTargetError) -> Void) {
        do throws(DebugTargetError) {
            try body(target, selected)
            answer("OK")
        } catch { answer(error) }
    }

    private static func twoDigits(_ value: UInt8) -> String {
        String(decoding: Hexadecimal.encode([value]), as: UTF8.self)
    }

    private var stopReply: String {
        let thread = "thread:\(String(lastStop.thread, radix: 16));"
        switch lastStop.reason {
        case .interrupt: return "T02" + thread
        case .step: return "T05" + thread
        case .softwareBreakpoint: return "T05" + thread + (features.contains("swbreak+") ? "swbreak:;" : "")
        case .hardwareBreakpoint: return "T05" + thread + (features.contains("hwbreak+") ? "hwbreak:;" : "")
        case .watchpoint(let kind, let address):
            let name = kind == .accessWatch ? "awatch" : "watch"
            return "T05" + thread + "\(name):\(String(address, radix: 16));"
        case .failure: return "T06" + thread
        }
    }

    // MARK: Requests

    private mutating func handle(_ data: [UInt8]) {
        switch Request(data) {
        case .stopReason: answer(stopReply)
        case .readRegisters: readRegisters()
        case .writeRegisters(let bytes): writeRegisters(bytes)
        case .readRegister(let number): readRegister(number)
        case .writeRegister(let number, let bytes): writeRegister(number, bytes)
        case .readMemory(let address, let count): readMemory(address, count)
        case .writeMemory(let address, let bytes):
            attempt { target, thread throws(DebugTargetError) in
                if !bytes.isEmpty { try target.writeMemory(bytes, at: address, thread: thread) }
            }
        case .resume(let actions): resume(actions)
        case .resumeSelected(let isStep, let address): resumeSelected(isStep: isStep, at: address)
        case .selectThread(let forResuming, let name): selectThread(name, forResuming: forResuming)
        case .isThreadAlive(let name):
            if case .one(let thread) = name, (1...target.threadCount).contains(thread) {
                answer("OK")
            } else {
                answer(error: .refused)
            }
        case .insert(let breakpoint):
            attempt { target, thread throws(DebugTargetError) in try target.insert(breakpoint, thread: thread) }
        case .remove(let breakpoint): attempt { target, _ throws(DebugTargetError) in try target.remove(breakpoint) }
        case .detach:
            target.detach()
            answer("OK")
            isFinished = true
        case .kill(let isAnswered):
            if isAnswered { answer("OK") }
            isFinished = true
            target.kill()
        case .features(let words):
            features = Set(words.prefix(64))
            answer(
                "PacketSize=\(String(PacketLimit.size, radix: 16));QStartNoAckMode+;qXfer:features:read+;vContSupported+;swbreak+;hwbreak+"
            )
        case .resumeKinds: answer("vCont;c;C;s;S")
        case .stopAcknowledging:
            answer("OK")
            isAcknowledging = false
        // The machine was there before the debugger: a debugger that ends leaves it running.
        case .isAttached: answer("1")
        case .currentThread: answer("QC" + String(selected, radix: 16))
        // All in one list: 4 digits each at most, of which a packet holds more than KVM has vCPUs.
        case .threads: answer("m" + (1...target.threadCount).map { String($0, radix: 16) }.joined(separator: ","))
        case .moreThreads: answer("l")
        case .describeThread(let name):
            guard let thread = number(name) else { return answer(error: .refused) }
            answer(Hexadecimal.encode(target.describe(thread: thread).utf8))
        case .readDescription(let annex, let offset, let count): readDescription(annex, offset, count)
        case .monitor(let command):
            let text = target.monitor(command, thread: selected)
            answer(Hexadecimal.encode(text.utf8.prefix(PacketLimit.memory)))
        case .unknown: answer("")
        case .malformed: answer(error: .refused)
        }
    }

    /// The thread that a name means; nil when there is none such.
    private func number(_ name: ThreadName) -> Int? {
        switch name {
        case .any, .all: lastStop.thread
        case .one(let thread): (1...target.threadCount).contains(thread) ? thread : nil
        }
    }

    private mutating func selectThread(_ name: ThreadName, forResuming: Bool) {
        guard let thread = number(name) else { return answer(error: .refused) }
        if forResuming { resumed = name } else { selected = thread }
        answer("OK")
    }

    // MARK: Registers and memory

    private mutating func readRegisters() {
        do throws(DebugTargetError) {
            let file = try target.registers(of: selected)
            answer(RegisterSet.all.indices.flatMap { Self.digits(of: $0, in: file) })
        } catch { answer(error) }
    }

    private mutating func readRegister(_ number: Int) {
        guard RegisterSet.all.indices.contains(number) else { return answer(error: .refused) }
        do throws(DebugTargetError) { answer(Self.digits(of: number, in: try target.registers(of: selected))) } catch {
            answer(error)
        }
    }

    private static func digits(of number: Int, in file: RegisterFile) -> [UInt8] {
        let bytes = file.bytes(of: number)
        return file.isMissing(number)
            ? [UInt8](repeating: UInt8(ascii: "x"), count: bytes.count * 2) : Hexadecimal.encode(bytes)
    }

    /// All of them, or the first ones: what is not sent stays.
    private mutating func writeRegisters(_ bytes: [UInt8]) {
        attempt { target, thread throws(DebugTargetError) in
            var file = try target.registers(of: thread)
            var changed: [Int] = []
            for (number, register) in RegisterSet.all.enumerated() where register.offset + register.size <= bytes.count
            {
                let value = bytes[register.offset..<register.offset + register.size]
                if !value.elementsEqual(file.bytes(of: number)) {
                    file.setBytes(value, of: number)
                    changed.append(number)
                }
            }
            if !changed.isEmpty { try target.setRegisters(file, changing: changed, of: thread) }
        }
    }

    private mutating func writeRegister(_ number: Int, _ bytes: [UInt8]) {
        guard RegisterSet.all.indices.contains(number), bytes.count == RegisterSet.all[number].size else {
            return answer(error: .refused)
        }
        attempt { target, thread throws(DebugTargetError) in
            var file = try target.registers(of: thread)
            file.setBytes(bytes, of: number)
            try target.setRegisters(file, changing: [number], of: thread)
        }
    }

    private mutating func readMemory(_ address: UInt64, _ count: Int) {
        guard count > 0 else { return answer("") }
        do throws(DebugTargetError) {
            answer(
                Hexadecimal.encode(
                    try target.readMemory(at: address, count: min(count, PacketLimit.memory), thread: selected)))
        } catch { answer(error) }
    }

    private mutating func readDescription(_ annex: String, _ offset: Int, _ count: Int) {
        guard annex == "target.xml" else { return answer("E00") }
        let text = Array(RegisterSet.description.utf8)
        guard offset <= text.count else { return answer(error: .refused) }
        let part = text[offset...].prefix(min(count, PacketLimit.memory))
        answer([UInt8(ascii: part.endIndex == text.count ? "l" : "m")] + part)
    }

    // MARK: Resuming

    private mutating func resume(_ actions: [Request.ThreadAction]) {
        let plan = (1...target.threadCount).map { thread in
            let action = actions.first { action in
                switch action.thread {
                case .any, .all: true
                case .one(let name): name == thread
                }
            }
            return action.map { $0.isStep ? ResumeAction.step : .run } ?? .stay
        }
        start(plan)
    }

    /// The packets from before `vCont`: one thread steps alone, or all of them run unless one was selected.
    private mutating func resumeSelected(isStep: Bool, at address: UInt64?) {
        let thread = number(resumed) ?? lastStop.thread
        if let address {
            do throws(DebugTargetError) {
                var file = try target.registers(of: thread)
                file[RegisterSet.rip] = address
                try target.setRegisters(file, changing: [RegisterSet.rip], of: thread)
            } catch { return answer(error) }
        }
        let isAlone = isStep || resumed == .one(thread)
        start((1...target.threadCount).map { $0 == thread ? (isStep ? .step : .run) : isAlone ? .stay : .run })
    }

    private mutating func start(_ plan: [ResumeAction]) {
        guard plan.contains(where: { $0 != .stay }) else { return answer(error: .refused) }
        isRunning = true
        target.resume(plan)
    }
}
