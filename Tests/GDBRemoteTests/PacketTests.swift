// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

@testable import GDBRemote

@Suite(.timed) struct PacketTests {
    private func events(_ bytes: [UInt8]) -> [PacketReader.Event] {
        var reader = PacketReader()
        return bytes.compactMap { reader.take($0) }
    }

    private func events(_ text: String) -> [PacketReader.Event] { events(Array(text.utf8)) }

    @Test func aPacketIsItsData() {
        #expect(events("$g#67") == [.packet(Array("g".utf8))])
        #expect(events("+$?#3f-") == [.acknowledged, .packet(Array("?".utf8)), .rejected])
        #expect(events([3, 0x24, 3, 0x23, 0x30, 0x33]) == [.interrupt, .packet([3])])
    }

    @Test func aWrongChecksumIsDamage() {
        #expect(events("$g#68") == [.damaged])
        #expect(events("$g#zz") == [.damaged])
        #expect(events("$g#68$g#67") == [.damaged, .packet(Array("g".utf8))])
    }

    @Test func aPacketBeginsAnewWhereTheOneBeforeWasCut() {
        #expect(events("$m100$g#67") == [.packet(Array("g".utf8))])
    }

    /// Between packets; within one any byte is data.
    @Test func aByteThatBeginsNoPacketIsForeign() {
        #expect(events("+POST") == [.acknowledged] + Array(repeating: .foreign, count: 4))
        #expect(events("$g#67\n") == [.packet(Array("g".utf8)), .foreign])
        #expect(events([0]) == [.foreign])
        #expect(events("$GET /#2f") == [.packet(Array("GET /".utf8))])
        // Telnet's BREAK, and another command.
        #expect(events([255, 243]) == [.interrupt])
        #expect(events([255, 251]) == [.foreign])
    }

    @Test func escapedBytesAreThemselves() {
        let data: [UInt8] = Array("X0,4:".utf8) + [0x23, 0x24, 0x7d, 0x2a, 0, 0xff]
        #expect(events(packet(data)) == [.packet(data)])
    }

    @Test func anEndlessPacketIsNotKept() {
        let long = [UInt8](repeating: UInt8(ascii: "a"), count: PacketLimit.size + 1)
        #expect(events(packet(long)) == [.tooLong])
        #expect(events(packet(Array(long.dropLast()))) == [.packet(Array(long.dropLast()))])
        // What comes behind it is read again.
        #expect(events(packet(long) + packet([UInt8(ascii: "g")])) == [.tooLong, .packet(Array("g".utf8))])
    }

    // MARK: Requests

    private func request(_ text: String) -> Request { Request(Array(text.utf8)) }

    @Test func requestsAreUnderstood() {
        #expect(request("?") == .stopReason)
        #expect(request("g") == .readRegisters)
        #expect(request("G0102") == .writeRegisters([1, 2]))
        #expect(request("p10") == .readRegister(16))
        #expect(request("P10=0102030405060708") == .writeRegister(16, [1, 2, 3, 4, 5, 6, 7, 8]))
        #expect(request("mffffffff81000000,40") == .readMemory(address: 0xffff_ffff_8100_0000, count: 64))
        #expect(request("M10,2:abCD") == .writeMemory(address: 16, bytes: [0xab, 0xcd]))
        #expect(request("X10,2:ab") == .writeMemory(address: 16, bytes: [0x61, 0x62]))
        #expect(request("Z0,1000,1") == .insert(Breakpoint(kind: .software, address: 0x1000, size: 1)))
        #expect(request("z2,1000,8") == .remove(Breakpoint(kind: .writeWatch, address: 0x1000, size: 8)))
        #expect(request("Hg2") == .selectThread(forResuming: false, .one(2)))
        #expect(request("Hc-1") == .selectThread(forResuming: true, .all))
        #expect(request("T1f") == .isThreadAlive(.one(31)))
        #expect(request("qSupported:swbreak+;hwbreak+") == .features(["swbreak+", "hwbreak+"]))
        #expect(request("qRcmd,68656c70") == .monitor("help"))
        #expect(
            request("qXfer:features:read:target.xml:0,fff")
                == .readDescription(annex: "target.xml", offset: 0, count: 0xfff))
        #expect(request("qThreadExtraInfo,2") == .describeThread(.one(2)))
        #expect(request("qC") == .currentThread)
        #expect(request("vCont?") == .resumeKinds)
        #expect(request("D;1") == .detach)
        #expect(request("vKill;1") == .kill(isAnswered: true))
    }

    @Test func actionsOfThreads() {
        let step = Request.ThreadAction(isStep: true, thread: .one(1))
        let run = Request.ThreadAction(isStep: false, thread: .all)
        #expect(request("vCont;s:1;c") == .resume([step, run]))
        #expect(request("vCont;S05:1;C05:-1") == .resume([step, run]))
        #expect(request("c") == .resumeSelected(isStep: false, address: nil))
        #expect(request("s1000") == .resumeSelected(isStep: true, address: 0x1000))
        #expect(request("C05") == .resumeSelected(isStep: false, address: nil))
        #expect(request("S05;1000") == .resumeSelected(isStep: true, address: 0x1000))
    }

    @Test(arguments: [
        "G0", "Gxx", "p", "pzz", "P10", "P10=0", "m", "m10", "m10,", "m,4", "m10,4:00", "M10,4:00", "M10,2:0",
        "X10,4:ab", "Z0,10", "Z9,10,1",
        "Z0,10,1;X1,0", "Hx1", "Hg", "T", "vCont;", "vCont;x", "vCont;c:", "vCont;c:1x", "vCont;c;", "qRcmd,6",
        "qXfer:features:read:target.xml",
        "qXfer:features:read:target.xml:0", "m11111111111111111,4", "?1", "cxyz", "C", "S05:", "qThreadExtraInfo,",
    ]) func wrongSpellingsAreRefused(text: String) { #expect(request(text) == .malformed) }

    @Test(arguments: ["", "!", "A", "qSymbol::", "vMustReplyEmpty", "QNonStop:1", "qCRC:1,2", "x", "\u{0}"])
    func unknownOnesAreNotErrors(text: String) { #expect(request(text) == .unknown) }
}
