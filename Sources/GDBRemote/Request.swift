// SPDX-License-Identifier: Apache-2.0

/// A debugger's request: a packet, parsed and checked, but not yet compared with the machine.
enum Request: Equatable {
    /// `?`
    case stopReason
    /// `g`, `G`
    case readRegisters
    case writeRegisters([UInt8])
    /// `p`, `P`
    case readRegister(Int)
    case writeRegister(Int, [UInt8])
    /// `m`; `M`, `X`
    case readMemory(address: UInt64, count: Int)
    case writeMemory(address: UInt64, bytes: [UInt8])
    /// `vCont`: the first action that names a thread is its action.
    case resume([ThreadAction])
    /// `c`, `s`, `C`, `S`, with the address to continue at
    case resumeSelected(isStep: Bool, address: UInt64?)
    /// `Hg`, `Hc`
    case selectThread(forResuming: Bool, ThreadName)
    /// `T`
    case isThreadAlive(ThreadName)
    /// `Z`, `z`
    case insert(Breakpoint)
    case remove(Breakpoint)
    /// `D`, `k`, `vKill`
    case detach
    case kill(isAnswered: Bool)
    /// `qSupported` with the debugger's own features
    case features([String])
    /// `vCont?`
    case resumeKinds
    /// `QStartNoAckMode`
    case stopAcknowledging
    /// `qAttached`, `qC`, `qfThreadInfo`, `qsThreadInfo`, `qThreadExtraInfo`
    case isAttached
    case currentThread
    case threads
    case moreThreads
    case describeThread(ThreadName)
    /// `qXfer:features:read`
    case readDescription(annex: String, offset: Int, count: Int)
    /// `qRcmd`
    case monitor(String)
    /// A packet that this stub does not support; the protocol's answer is an empty one.
    case unknown
    /// A known packet, spelled wrongly.
    case malformed

    struct ThreadAction: Equatable {
        let isStep: Bool
        let thread: ThreadName
    }
}

/// How packets name threads: a number from 1, 0 for any, -1 for all.
enum ThreadName: Equatable {
    case any
    case all
    case one(Int)
}

extension Request {
    /// Understands a packet's data.
    init(_ data: [UInt8]) {
        var text = PacketText(data)
        guard let kind = text.next() else {
            self = .unknown
            return
        }
        let request: Request? =
            switch kind {
            case UInt8(ascii: "?"): text.isAtEnd ? .stopReason : nil
            case UInt8(ascii: "g"): text.isAtEnd ? .readRegisters : nil
            case UInt8(ascii: "G"): Hexadecimal.decode(text.rest).map { .writeRegisters($0) }
            case UInt8(ascii: "p"): text.lastNumber().flatMap { Int(exactly: $0) }.map { .readRegister($0) }
            case UInt8(ascii: "P"): Self.writeRegister(&text)
            case UInt8(ascii: "m"): Self.readMemory(&text)
            case UInt8(ascii: "M"), UInt8(ascii: "X"): Self.writeMemory(&text, isBinary: kind == UInt8(ascii: "X"))
            case UInt8(ascii: "c"), UInt8(ascii: "s"):
                Self.resumeSelected(&text, isStep: kind == UInt8(ascii: "s"), hasSignal: false)
            case UInt8(ascii: "C"), UInt8(ascii: "S"):
                Self.resumeSelected(&text, isStep: kind == UInt8(ascii: "S"), hasSignal: true)
            case UInt8(ascii: "H"): Self.selectThread(&text)
            case UInt8(ascii: "T"): text.lastThread().map { .isThreadAlive($0) }
            case UInt8(ascii: "Z"): Self.breakpoint(&text).map { .insert($0) }
            case UInt8(ascii: "z"): Self.breakpoint(&text).map { .remove($0) }
            case UInt8(ascii: "D"): .detach
            case UInt8(ascii: "k"): .kill(isAnswered: false)
            case UInt8(ascii: "q"), UInt8(ascii: "Q"), UInt8(ascii: "v"): Self.named(data)
            default: .unknown
            }
        self = request ?? .malformed
    }

    /// `P n=bytes`
    private static func writeRegister(_ text: inout PacketText) -> Request? {
        guard let number = text.number(), let register = Int(exactly: number), text.skip("="),
            let bytes = Hexadecimal.decode(text.rest)
        else { return nil }
        return .writeRegister(register, bytes)
    }

    /// `m address,count`
    private static func readMemory(_ text: inout PacketText) -> Request? {
        guard let address = text.number(), text.skip(","), let count = text.lastNumber() else { return nil }
        return .readMemory(address: address, count: Int(clamping: count))
    }

    /// `M address,count:digits` and `X address,count:bytes`
    private static func writeMemory(_ text: inout PacketText, isBinary: Bool) -> Request? {
        guard let address = text.number(), text.skip(","), let count = text.number(), text.skip(":") else { return nil }
        guard let bytes = isBinary ? Array(text.rest) : Hexadecimal.decode(text.rest), UInt64(bytes.count) == count
        else { return nil }
        return .writeMemory(address: address, bytes: bytes)
    }

    /// `c [address]`, `C signal[;address]`: a machine has no signals, so theirs is read over.
    private static func resumeSelected(_ text: inout PacketText, isStep: Bool, hasSignal: Bool) -> Request? {
        if hasSignal {
            guard text.number() != nil else { return nil }
            if text.isAtEnd { return .resumeSelected(isStep: isStep, address: nil) }
            guard text.skip(";") else { return nil }
        } else if text.isAtEnd {
            return .resumeSelected(isStep: isStep, address: nil)
        }
        return text.lastNumber().map { .resumeSelected(isStep: isStep, address: $0) }
    }

    /// `Hg thread`, `Hc thread`
    private static func selectThread(_ text: inout PacketText) -> Request? {
        guard let use = text.next(), use == UInt8(ascii: "g") || use == UInt8(ascii: "c"),
            let thread = text.lastThread()
        else { return nil }
        return .selectThread(forResuming: use == UInt8(ascii: "c"), thread)
    }

    /// `Z kind,address,size`; what may follow (conditions, commands) is not announced, so it does not come.
    private static func breakpoint(_ text: inout PacketText) -> Breakpoint? {
        guard let number = text.number(), text.skip(","), let address = text.number(), text.skip(","),
            let size = text.lastNumber()
        else { return nil }
        guard let kind = Breakpoint.Kind(rawValue: Int(clamping: number)) else { return nil }
        return Breakpoint(kind: kind, address: address, size: Int(clamping: size))
    }

    /// Packets whose name is a word.
    private static func named(_ data: [UInt8]) -> Request? {
        var text = PacketText(data)
        if text.skip("qSupported") {
            let words =
                text.skip(":") ? String(decoding: text.rest, as: UTF8.self).split(separator: ";").map(String.init) : []
            return .features(words)
        }
        if text.skip("vCont?") { return .resumeKinds }
        if text.skip("vCont;") { return resume(&text) }
        if text.skip("vKill") { return .kill(isAnswered: true) }
        if text.skip("QStartNoAckMode") { return .stopAcknowledging }
        if text.skip("qAttached") { return .isAttached }
        if text.skip("qfThreadInfo") { return .threads }
        if text.skip("qsThreadInfo") { return .moreThreads }
        if text.skip("qThreadExtraInfo,") { return text.lastThread().map { .describeThread($0) } }
        if text.skip("qXfer:features:read:") { return readDescription(&text) }
        if text.skip("qRcmd,") {
            return Hexadecimal.decode(text.rest).map { .monitor(String(decoding: $0, as: UTF8.self)) }
        }
        return data == Array("qC".utf8) ? .currentThread : .unknown
    }

    /// `vCont;action[:thread][;action…]`, of the actions `c`, `s`, and `C` and `S` with a signal.
    private static func resume(_ text: inout PacketText) -> Request? {
        var actions: [ThreadAction] = []
        repeat {
            guard let letter = text.next() else { return nil }
            switch letter {
            case UInt8(ascii: "c"), UInt8(ascii: "s"): break
            case UInt8(ascii: "C"), UInt8(ascii: "S"): if text.number() == nil { return nil }
            default: return nil
            }
            var thread = ThreadName.all
            if text.skip(":") {
                guard let name = text.thread() else { return nil }
                thread = name
            }
            actions.append(ThreadAction(isStep: letter | 0x20 == UInt8(ascii: "s"), thread: thread))
        } while text.skip(";")
        return text.isAtEnd ? .resume(actions) : nil
    }

    /// `annex:offset,count`
    private static func readDescription(_ text: inout PacketText) -> Request? {
        guard let colon = text.rest.firstIndex(of: UInt8(ascii: ":")) else { return nil }
        let annex = String(decoding: text.rest[..<colon], as: UTF8.self)
        text = PacketText(text.rest[(colon + 1)...])
        guard let offset = text.number(), text.skip(","), let count = text.lastNumber() else { return nil }
        return .readDescription(annex: annex, offset: Int(clamping: offset), count: Int(clamping: count))
    }
}

/// A packet's data, read from its start.
private struct PacketText {
    private(set) var rest: ArraySlice<UInt8>

    init(_ data: some Sequence<UInt8>) { rest = Array(data)[...] }

    var isAtEnd: Bool { rest.isEmpty }

    mutating func next() -> UInt8? { rest.popFirst() }

    /// Reads over a word, if it is there.
    mutating func skip(_ word: StaticString) -> Bool {
        let length = word.utf8CodeUnitCount
        // A literal's bytes are never freed.
        let matches = unsafe rest.starts(with: UnsafeBufferPointer(start: word.utf8Start, count: length))
        if matches { rest = rest.dropFirst(length) }
        return matches
    }

    /// A hexadecimal number of up to 64 bits.
    mutating func number() -> UInt64? {
        let digits = rest.prefix { Hexadecimal.value(of: $0) != nil }
        guard (1...16).contains(digits.count) else { return nil }
        rest = rest.dropFirst(digits.count)
        return digits.reduce(0) { $0 << 4 | UInt64(Hexadecimal.value(of: $1) ?? 0) }
    }

    /// A number, and nothing behind it.
    mutating func lastNumber() -> UInt64? {
        let number = number()
        return isAtEnd ? number : nil
    }

    mutating func thread() -> ThreadName? {
        if skip("-1") { return .all }
        guard let number = number(), let thread = Int(exactly: number) else { return nil }
        return thread == 0 ? .any : .one(thread)
    }

    mutating func lastThread() -> ThreadName? {
        let thread = thread()
        return isAtEnd ? thread : nil
    }
}
