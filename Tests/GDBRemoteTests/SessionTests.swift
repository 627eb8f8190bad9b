// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

@testable import GDBRemote

@Suite(.timed) struct SessionTests {
    @Test func acknowledgesUntilItIsToldNotTo() {
        var conversation = Conversation()
        #expect(conversation.raw(packet(Array("qC".utf8))) == [UInt8(ascii: "+")] + packet(Array("QC1".utf8)))
        #expect(conversation.raw(Array("$qC#00".utf8)) == [UInt8(ascii: "-")])
        // Asked again, it says the same again.
        #expect(conversation.raw([UInt8(ascii: "-")]) == packet(Array("QC1".utf8)))
        #expect(conversation.ask("QStartNoAckMode") == "OK")
        #expect(conversation.raw(packet(Array("qC".utf8))) == packet(Array("QC1".utf8)))
        #expect(conversation.raw(Array("$qC#00".utf8)) == [])
    }

    @Test func saysWhatItCanDo() throws {
        var conversation = Conversation()
        let reply = conversation.ask("qSupported:swbreak+")
        let answer = try #require(reply)
        for word in ["PacketSize=4000", "QStartNoAckMode+", "qXfer:features:read+", "vContSupported+"] {
            #expect(answer.contains(word))
        }
        #expect(conversation.ask("vCont?") == "vCont;c;C;s;S")
        #expect(conversation.ask("vMustReplyEmpty") == "")
        #expect(conversation.ask("qAttached") == "1")
        #expect(conversation.ask("?") == "T02thread:1;")
    }

    // MARK: State

    @Test func registersGoThereAndBack() throws {
        var conversation = Conversation()
        conversation.target.files[0][RegisterSet.rip] = 0xffff_ffff_8100_0000
        #expect(conversation.ask("p10") == "00000081ffffffff")
        #expect(conversation.ask("P0=0807060504030201") == "OK")
        #expect(conversation.target.files[0][0] == 0x0102_0304_0506_0708)
        let reply = conversation.ask("g")
        let all = try #require(reply)
        #expect(all.count == RegisterSet.size * 2 && all.hasPrefix("0807060504030201"))
        // The first three, and the rest stays.
        #expect(conversation.ask("G0100000000000000" + "0200000000000000" + "0300000000000000") == "OK")
        #expect((0..<3).map { conversation.target.files[0][$0] } == [1, 2, 3])
        #expect(conversation.target.files[0][RegisterSet.rip] == 0xffff_ffff_8100_0000)
        // A target that refuses changes nothing.
        #expect(conversation.ask("P12=08000000") == "E16")
        #expect(conversation.target.files[0][RegisterSet.segments] == 0)
        #expect(conversation.ask("p42") == "E16")
        #expect(conversation.ask("P0=00") == "E16")
        conversation.target.files[0].setMissing(RegisterSet.mxcsr)
        #expect(conversation.ask("p38") == "xxxxxxxx")
    }

    @Test func registersAreOfTheSelectedThread() {
        var conversation = Conversation()
        conversation.target.files[1][0] = 0x77
        #expect(conversation.ask("Hg2") == "OK")
        #expect(conversation.ask("p0") == "7700000000000000")
        #expect(conversation.ask("Hg3") == "E16")
        #expect(conversation.ask("qC") == "QC2")
        #expect(conversation.ask("qfThreadInfo") == "m1,2")
        #expect(conversation.ask("qsThreadInfo") == "l")
        #expect(conversation.ask("qThreadExtraInfo,2") == "7643505520" + "31")
        #expect(conversation.ask("T2") == "OK")
        #expect(conversation.ask("T3") == "E16")
        #expect(conversation.ask("T0") == "E16")
    }

    @Test func memoryGoesThereAndBack() {
        var conversation = Conversation()
        #expect(conversation.ask("M1000,3:010203") == "OK")
        #expect(conversation.ask("m1000,4") == "01020300")
        #expect(
            conversation.raw(packet(Array("X1001,2:".utf8) + [0x23, 0x7d])).suffix(6) == packet(Array("OK".utf8))[...])
        #expect(conversation.ask("m1000,4") == "01237d00")
        // GDB asks so whether there is an X.
        #expect(conversation.ask("X1000,0:") == "OK")
        #expect(conversation.ask("m1fff,4") == "00")
        #expect(conversation.ask("m2000,1") == "E0e")
        #expect(conversation.ask("mffffffffffffffff,ffffffffffffffff") == "E0e")
        #expect(conversation.ask("M1fff,2:0102") == "E0e")
        #expect(conversation.target.memory[0xfff] == 0)
        #expect(conversation.ask("m1000,ffffffffffffffff")?.count == 4096 * 2)
    }

    @Test func theDescriptionComesInPieces() throws {
        var conversation = Conversation()
        var text = ""
        while true {
            let reply = conversation.ask("qXfer:features:read:target.xml:\(String(text.utf8.count, radix: 16)),3e8")
            let piece = try #require(reply)
            text += piece.dropFirst()
            if piece.hasPrefix("l") { break }
            #expect(piece.hasPrefix("m") && piece.utf8.count == 1001)
        }
        #expect(text == RegisterSet.description)
        #expect(conversation.ask("qXfer:features:read:other.xml:0,10") == "E00")
        #expect(conversation.ask("qXfer:features:read:target.xml:ffffffff,10") == "E16")
        #expect(conversation.ask("qXfer:features:read:target.xml:ffffffffffffffff,ffffffffffffffff") == "E16")
    }

    /// The first registers are where GDB has them by default.
    @Test func registersAreNumberedAsGDBDoes() {
        let names = RegisterSet.all.map(\.name)
        #expect(
            names[RegisterSet.rip] == "rip" && names[RegisterSet.eflags] == "eflags"
                && names[RegisterSet.segments] == "cs")
        #expect(
            names[RegisterSet.st0] == "st0" && names[RegisterSet.x87Control] == "fctrl"
                && names[RegisterSet.xmm0] == "xmm0")
        #expect(
            names[RegisterSet.mxcsr] == "mxcsr" && names[RegisterSet.fsBase] == "fs_base"
                && names[RegisterSet.efer] == "efer")
        #expect(RegisterSet.all[RegisterSet.cr0].name == "cr0" && names.last == "efer")
    }

    @Test func breakpointsArePassedOn() {
        var conversation = Conversation()
        #expect(conversation.ask("Z0,1000,1") == "OK")
        #expect(conversation.ask("Z3,1000,1") == "")
        #expect(conversation.target.breakpoints == [Breakpoint(kind: .software, address: 0x1000, size: 1)])
        for address in 1...3 { #expect(conversation.ask("Z1,\(address),1") == "OK") }
        #expect(conversation.ask("Z1,9,1") == "E1c")
        #expect(conversation.ask("z0,1000,1") == "OK")
        #expect(conversation.target.breakpoints.count == 3)
    }

    @Test func theMonitorIsAsked() {
        var conversation = Conversation()
        #expect(conversation.ask("qRcmd,68656c70") == "6865617264" + "2068656c70" + "0a")
        #expect(conversation.target.commands == ["help"])
    }

    // MARK: Running

    @Test func resumesByThread() {
        var conversation = Conversation()
        #expect(conversation.ask("vCont;s:1;c") == nil)
        #expect(conversation.session.isRunning && conversation.target.plan == [.step, .run])
        conversation.session.stopped(DebugStop(thread: 1, reason: .step))
        #expect(conversation.takeOutput() == "T05thread:1;")
        #expect(conversation.ask("vCont;s:2") == nil)
        #expect(conversation.target.plan == [.stay, .step])
        conversation.session.stopped(DebugStop(thread: 2, reason: .hardwareBreakpoint))
        #expect(conversation.takeOutput() == "T05thread:2;")
        #expect(conversation.ask("vCont;c:9") == "E16")
        #expect(!conversation.session.isRunning)
    }

    @Test func resumesTheOldWay() {
        var conversation = Conversation()
        #expect(conversation.ask("Hc0") == "OK")
        #expect(conversation.ask("s1234") == nil)
        #expect(conversation.target.plan == [.step, .stay] && conversation.target.files[0][RegisterSet.rip] == 0x1234)
        conversation.session.stopped(DebugStop(thread: 1, reason: .step))
        #expect(conversation.takeOutput() == "T05thread:1;")
        #expect(conversation.ask("c") == nil)
        #expect(conversation.target.plan == [.run, .run])
        conversation.session.stopped(DebugStop(thread: 1, reason: .step))
        #expect(conversation.takeOutput() == "T05thread:1;")
        #expect(conversation.ask("Hc2") == "OK")
        #expect(conversation.ask("c") == nil)
        #expect(conversation.target.plan == [.stay, .run])
    }

    @Test func stopsSayWhy() {
        var conversation = Conversation()
        _ = conversation.ask("qSupported:swbreak+;hwbreak+")
        func stop(_ reason: DebugStop.Reason) -> String? {
            _ = conversation.ask("vCont;c")
            conversation.session.stopped(DebugStop(thread: 2, reason: reason))
            return conversation.takeOutput()
        }
        #expect(stop(.softwareBreakpoint) == "T05thread:2;swbreak:;")
        #expect(stop(.hardwareBreakpoint) == "T05thread:2;hwbreak:;")
        #expect(stop(.watchpoint(.writeWatch, address: 0xabc)) == "T05thread:2;watch:abc;")
        #expect(stop(.watchpoint(.accessWatch, address: 0xabc)) == "T05thread:2;awatch:abc;")
        #expect(stop(.interrupt) == "T02thread:2;")
        #expect(stop(.failure("it crashed")) == "T06thread:2;")
        // The thread that stopped is the one that is looked at.
        #expect(conversation.ask("qC") == "QC2")
    }

    @Test func controlCStopsWhatRuns() {
        var conversation = Conversation()
        _ = conversation.raw([3])
        #expect(conversation.target.calls.isEmpty)
        _ = conversation.ask("vCont;c")
        _ = conversation.raw([3])
        #expect(conversation.target.calls == ["resume", "interrupt"])
    }

    @Test func requestsWaitForTheStop() {
        var conversation = Conversation()
        _ = conversation.ask("vCont;c")
        #expect(conversation.ask("qC") == nil)
        #expect(conversation.ask("vCont;c") == nil)
        #expect(conversation.target.calls == ["resume"])
        conversation.session.stopped(DebugStop(thread: 2, reason: .step))
        #expect(conversation.takeOutput() == "QC2")
        #expect(conversation.target.calls == ["resume", "resume"] && conversation.session.isRunning)
    }

    @Test func aFloodOfRequestsWhileItRunsEndsTheSession() {
        var conversation = Conversation()
        _ = conversation.ask("vCont;c")
        for _ in 0..<17 { _ = conversation.ask("g") }
        #expect(conversation.session.isFinished)
    }

    // MARK: Ends

    @Test func detaches() {
        var conversation = Conversation()
        #expect(conversation.ask("D") == "OK")
        #expect(conversation.session.isFinished && conversation.target.calls == ["detach"])
        #expect(conversation.ask("g") == nil)
    }

    @Test func kills() {
        var conversation = Conversation()
        #expect(conversation.ask("k") == nil)
        #expect(conversation.session.isFinished && conversation.target.calls == ["kill"])
        var polite = Conversation()
        #expect(polite.ask("vKill;1") == "OK")
        #expect(polite.target.calls == ["kill"])
    }

    @Test func theMachinesEndIsToldToWhoWaits() {
        var conversation = Conversation()
        _ = conversation.ask("vCont;c")
        conversation.session.ended(.status(0x2a))
        #expect(conversation.takeOutput() == "W2a" && conversation.session.isFinished)
        var killed = Conversation()
        _ = killed.ask("vCont;c")
        killed.session.ended(.signal(15))
        #expect(killed.takeOutput() == "X0f")
        var looking = Conversation()
        looking.session.ended(.status(0))
        #expect(looking.takeOutput() == nil && looking.session.isFinished)
    }

    // MARK: Noise

    @Test func aClientThatIsNoDebuggerIsLeft() {
        var conversation = Conversation()
        #expect(conversation.ask("qC") == "QC1")
        #expect(conversation.raw(Array("POST / HTTP/1.1\r\n\r\n".utf8) + packet(Array("k".utf8))) == [])
        #expect(conversation.session.isFinished && conversation.session.isForeign)
        let beginnings = (0...255 as ClosedRange<UInt8>).filter { DebugSession<FakeTarget>.canBegin(with: $0) }
        #expect(beginnings == [3] + Array("$+-".utf8))
    }

    /// Whatever comes, the session answers or is silent, keeps its bounds, and still works afterwards.
    @Test(arguments: 0..<40) func bearsRandomBytes(seed: UInt64) {
        var noise = SeededGenerator(seed: seed)
        var conversation = Conversation()
        for _ in 0..<200 {
            let bytes = (0..<Int.random(in: 0..<200, using: &noise)).map { _ in UInt8.random(in: 0...255, using: &noise)
            }
            _ = conversation.raw([UInt8(ascii: "$")] + bytes)
            if conversation.session.isFinished { conversation = Conversation() }
        }
        expectAlive(&conversation)
    }

    /// Well-framed packets whose data is almost right.
    @Test(arguments: 0..<40) func bearsMutatedPackets(seed: UInt64) {
        let seeds = [
            "?", "g", "p10", "P10=0102030405060708", "m1000,40", "M1000,2:0102", "X1000,2:ab", "Z0,1000,1", "z2,1000,8",
            "Hg2", "Hc-1", "T1", "vCont?",
            "vCont;s:1;c", "c", "s1000", "C05", "S05;1000", "qSupported:swbreak+;hwbreak+", "qRcmd,68656c70",
            "qXfer:features:read:target.xml:0,fff",
            "qThreadExtraInfo,2", "qC", "qfThreadInfo", "qsThreadInfo", "QStartNoAckMode", "qAttached", "G00",
        ].map { Array($0.utf8) }
        var noise = SeededGenerator(seed: seed)
        var conversation = Conversation()
        for _ in 0..<2000 {
            var data = seeds.randomElement(using: &noise)!
            for _ in 0..<Int.random(in: 0...3, using: &noise) {
                let place = Int.random(in: 0...data.count, using: &noise)
                switch Int.random(in: 0..<5, using: &noise) {
                case 0: data.insert(UInt8.random(in: 0...255, using: &noise), at: place)
                case 1: if place < data.count { data.remove(at: place) }
                case 2: if place < data.count { data[place] = UInt8.random(in: 0...255, using: &noise) }
                case 3: data.insert(contentsOf: Array(repeating: UInt8(ascii: "f"), count: 16), at: place)
                default: data += seeds.randomElement(using: &noise)!
                }
            }
            let output = conversation.raw(packet(data))
            #expect(output.count <= 2 * PacketLimit.size + 64)
            // What the machine would do: it stops again, and another debugger comes.
            if conversation.session.isRunning { conversation.session.stopped(DebugStop(thread: 2, reason: .step)) }
            conversation.session.output = []
            if conversation.session.isFinished { conversation = Conversation() }
        }
        expectAlive(&conversation)
    }

    private func expectAlive(_ conversation: inout Conversation) {
        if conversation.session.isRunning { conversation.session.stopped(DebugStop(thread: 1, reason: .step)) }
        if conversation.session.isFinished { return }
        conversation.session.output = []
        #expect(conversation.ask("Hg1") == "OK")
        #expect(conversation.ask("qC") == "QC1")
    }
}
