// SPDX-License-Identifier: Apache-2.0

/// Fields of a frame, in network byte order. What is beyond its end reads as zero: who reads has checked the length.
struct FrameBytes {
    let bytes: ArraySlice<UInt8>

    var count: Int { bytes.count }

    func byte(_ offset: Int) -> UInt8 {
        let index = bytes.startIndex + offset
        return offset >= 0 && index < bytes.endIndex ? bytes[index] : 0
    }
    func half(_ offset: Int) -> UInt16 { UInt16(byte(offset)) << 8 | UInt16(byte(offset + 1)) }
    func word(_ offset: Int) -> UInt32 { UInt32(half(offset)) << 16 | UInt32(half(offset + 2)) }
    /// Six bytes.
    func address(_ offset: Int) -> UInt64 { UInt64(half(offset)) << 32 | UInt64(word(offset + 2)) }
    /// What is from one offset to another one; `nil` unless all of that is in the frame.
    func slice(from start: Int, to end: Int) -> FrameBytes? {
        guard start >= 0, start <= end, end <= count else { return nil }
        return FrameBytes(bytes: bytes[bytes.startIndex + start..<bytes.startIndex + end])
    }
}

extension [UInt8] {
    mutating func append(half: UInt16) { self += [UInt8(half >> 8), UInt8(truncatingIfNeeded: half)] }
    mutating func append(word: UInt32) {
        append(half: UInt16(word >> 16))
        append(half: UInt16(truncatingIfNeeded: word))
    }
    mutating func append(address: UInt64) {
        append(half: UInt16(truncatingIfNeeded: address >> 32))
        append(word: UInt32(truncatingIfNeeded: address))
    }
}

/// IEEE 802.3.
enum Ethernet {
    static let headerSize = 14
    static let ipv4: UInt16 = 0x0800
    static let arp: UInt16 = 0x0806
}

/// An ARP request for an IPv4 address (RFC 826).
struct ARPRequest {
    var senderHardware: UInt64
    var senderAddress: UInt32
    var target: UInt32

    init?(_ frame: FrameBytes) {
        let start = Ethernet.headerSize
        guard frame.count >= start + 28, frame.half(12) == Ethernet.arp, frame.half(start) == 1,
            frame.half(start + 2) == Ethernet.ipv4, frame.half(start + 4) == 0x0604, frame.half(start + 6) == 1
        else { return nil }
        senderHardware = frame.address(start + 8)
        senderAddress = frame.word(start + 14)
        target = frame.word(start + 24)
    }

    /// The frame of the answer.
    func reply(from hardware: UInt64) -> [UInt8] {
        var frame: [UInt8] = []
        frame.append(address: senderHardware)
        frame.append(address: hardware)
        frame.append(half: Ethernet.arp)
        for field in [1, Ethernet.ipv4, 0x0604, 2] as [UInt16] { frame.append(half: field) }
        frame.append(address: hardware)
        frame.append(word: target)
        frame.append(address: senderHardware)
        frame.append(word: senderAddress)
        return frame
    }
}

/// A TCP segment (RFC 9293 §3.1) in an IPv4 packet that is not a fragment. Checksums are not looked at: the frame comes
/// from memory, and a driver leaves them to the device.
struct Segment: Equatable {
    static let fin: UInt8 = 1, syn: UInt8 = 2, rst: UInt8 = 4, push: UInt8 = 8, ack: UInt8 = 16

    var hardware: UInt64
    var source: UInt32
    var target: UInt32
    var sourcePort: UInt16
    var targetPort: UInt16
    var sequence: UInt32
    var acknowledgment: UInt32
    var flags: UInt8
    var window: UInt16
    /// The largest segment that the sender takes, if it says so.
    var maximumSegment: UInt16?
    var payload: ArraySlice<UInt8>

    /// How many sequence numbers it takes up.
    var length: UInt32 {
        UInt32(payload.count) &+ (flags & Self.syn != 0 ? 1 : 0) &+ (flags & Self.fin != 0 ? 1 : 0)
    }

    func has(_ flag: UInt8) -> Bool { flags & flag != 0 }

    init?(_ frame: FrameBytes) {
        let ip = Ethernet.headerSize
        guard frame.count >= ip + 20, frame.half(12) == Ethernet.ipv4, frame.byte(ip) >> 4 == 4 else { return nil }
        let headerSize = Int(frame.byte(ip) & 15) * 4, total = Int(frame.half(ip + 2))
        // Protocol 6, and neither "more fragments" nor an offset.
        guard headerSize >= 20, frame.byte(ip + 9) == 6, frame.half(ip + 6) & 0x3fff == 0, total >= headerSize,
            let tcp = frame.slice(from: ip + headerSize, to: ip + total), tcp.count >= 20
        else { return nil }
        let offset = Int(tcp.byte(12) >> 4) * 4
        guard offset >= 20, let payload = tcp.slice(from: offset, to: tcp.count),
            let options = tcp.slice(from: 20, to: offset)
        else {
            return nil
        }
        hardware = frame.address(6)
        (source, target) = (frame.word(ip + 12), frame.word(ip + 16))
        (sourcePort, targetPort) = (tcp.half(0), tcp.half(2))
        (sequence, acknowledgment) = (tcp.word(4), tcp.word(8))
        flags = tcp.byte(13) & 0x3f
        window = tcp.half(14)
        self.payload = payload.bytes
        maximumSegment = Self.maximumSegment(options)
    }

    private static func maximumSegment(_ options: FrameBytes) -> UInt16? {
        var place = 0
        while place < options.count {
            switch options.byte(place) {
            case 0: return nil
            case 1: place += 1
            case 2: return options.byte(place + 1) == 4 && place + 4 <= options.count ? options.half(place + 2) : nil
            default:
                let length = Int(options.byte(place + 1))
                guard length >= 2 else { return nil }
                place += length
            }
        }
        return nil
    }
}

/// A segment to the guest.
struct ReplySegment {
    var sequence: UInt32
    var acknowledgment: UInt32 = 0
    var flags: UInt8
    var window: UInt16 = 0
    var maximumSegment: UInt16?
    var payload: ArraySlice<UInt8> = []

    /// The frame that carries it, with its checksums.
    /// - Parameter hardware: the sender's address.
    func frame(from hardware: UInt64, to peer: MetadataConnection.Peer, address: UInt32, port: UInt16) -> [UInt8] {
        let headerSize = maximumSegment == nil ? 20 : 24
        var frame: [UInt8] = []
        frame.reserveCapacity(Ethernet.headerSize + 20 + headerSize + payload.count)
        frame.append(address: peer.hardware)
        frame.append(address: hardware)
        frame.append(half: Ethernet.ipv4)
        frame.append(half: 0x4500)
        frame.append(half: UInt16(truncatingIfNeeded: 20 + headerSize + payload.count))
        // No identification, do not fragment; one hop is enough; TCP.
        frame.append(word: 0x4000)
        frame.append(half: 0x0106)
        frame.append(half: 0)
        frame.append(word: address)
        frame.append(word: peer.address)
        Self.store(Self.checksum(frame[Ethernet.headerSize...]), at: Ethernet.headerSize + 10, in: &frame)
        let start = frame.count
        frame.append(half: port)
        frame.append(half: peer.port)
        frame.append(word: sequence)
        frame.append(word: acknowledgment)
        frame += [UInt8(headerSize / 4) << 4, flags]
        frame.append(half: window)
        frame.append(word: 0)
        if let maximumSegment { frame.append(word: 0x0204_0000 | UInt32(maximumSegment)) }
        frame += payload
        var pseudo: [UInt8] = []
        pseudo.append(word: address)
        pseudo.append(word: peer.address)
        pseudo.append(half: 6)
        pseudo.append(half: UInt16(truncatingIfNeeded: frame.count - start))
        let sum = Self.checksum(frame[start...], adding: Self.sum(pseudo[...]))
        Self.store(sum, at: start + 16, in: &frame)
        return frame
    }

    private static func store(_ value: UInt16, at place: Int, in frame: inout [UInt8]) {
        frame[place] = UInt8(value >> 8)
        frame[place + 1] = UInt8(truncatingIfNeeded: value)
    }

    private static func sum(_ bytes: ArraySlice<UInt8>) -> UInt32 {
        var sum: UInt32 = 0, isHigh = true
        for byte in bytes {
            sum &+= isHigh ? UInt32(byte) << 8 : UInt32(byte)
            isHigh.toggle()
        }
        return sum
    }

    /// RFC 1071.
    static func checksum(_ bytes: ArraySlice<UInt8>, adding other: UInt32 = 0) -> UInt16 {
        var sum = sum(bytes) &+ other
        while sum >> 16 != 0 { sum = sum & 0xffff &+ sum >> 16 }
        return ~UInt16(truncatingIfNeeded: sum)
    }
}
