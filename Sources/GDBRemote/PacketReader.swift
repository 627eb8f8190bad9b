// SPDX-License-Identifier: Apache-2.0

/// Finds packets in what a debugger sends ("Remote Protocol Overview" in the manual of GDB): `$`, the data, `#`, two
/// digits of checksum.
///
/// The stream is not trusted: whatever it is, the reader keeps at most ``PacketLimit/size`` bytes of it. It loses
/// nothing on its way, so a byte between packets that begins none does not come from a debugger.
struct PacketReader {
    enum Event: Equatable {
        /// The packet's data, unescaped.
        case packet([UInt8])
        /// The checksum is wrong.
        case damaged
        /// A packet that exceeds the limit; it was skipped.
        case tooLong
        /// `+`
        case acknowledged
        /// `-`: the debugger requests the last packet again.
        case rejected
        /// Ctrl-C, the byte 3 between packets, or Telnet's BREAK, which GDB sends for `set remote interrupt-sequence
        /// BREAK`.
        case interrupt
        /// A byte between packets with which no debugger begins anything: the client is none.
        case foreign
    }

    private enum State {
        case idle
        /// Behind Telnet's IAC.
        case command
        case data
        case checksum(first: UInt8?)
    }

    /// RFC 854.
    private enum Telnet {
        static let command: UInt8 = 255
        static let breakCommand: UInt8 = 243
    }

    private var state = State.idle
    private var data: [UInt8] = []
    private var sum: UInt8 = 0
    private var isEscaped = false
    private var isTooLong = false

    /// Takes one byte.
    /// - Returns: what it completes.
    mutating func take(_ byte: UInt8) -> Event? {
        switch state {
        case .idle:
            switch byte {
            case UInt8(ascii: "$"): begin()
            case UInt8(ascii: "+"): return .acknowledged
            case UInt8(ascii: "-"): return .rejected
            case 3: return .interrupt
            case Telnet.command: state = .command
            default: return .foreign
            }
        case .command:
            state = .idle
            return byte == Telnet.breakCommand ? .interrupt : .foreign
        case .data where byte == UInt8(ascii: "$"): begin()  // the end of the packet before was lost
        case .data where byte == UInt8(ascii: "#"): state = .checksum(first: nil)
        case .data: add(byte)
        case .checksum(nil): state = .checksum(first: byte)
        case .checksum(let first?):
            state = .idle
            return complete(first, byte)
        }
        return nil
    }

    private mutating func begin() {
        state = .data
        data.removeAll(keepingCapacity: true)
        (sum, isEscaped, isTooLong) = (0, false, false)
    }

    private mutating func add(_ byte: UInt8) {
        sum &+= byte
        guard data.count < PacketLimit.size else { return isTooLong = true }
        if isEscaped {
            data.append(byte ^ 0x20)
            isEscaped = false
        } else if byte == UInt8(ascii: "}") {
            isEscaped = true
        } else {
            data.append(byte)
        }
    }

    private func complete(_ first: UInt8, _ second: UInt8) -> Event {
        guard let high = Hexadecimal.value(of: first), let low = Hexadecimal.value(of: second), sum == high << 4 | low
        else { return .damaged }
        return isTooLong ? .tooLong : .packet(data)
    }
}

/// What a packet may be, in both directions.
enum PacketLimit {
    /// Bytes of data; announced as `PacketSize`.
    static let size = 16 << 10
    /// Bytes of memory that fit into one answer as hexadecimal digits.
    static let memory = size / 2 - 16
}

/// Puts an answer into a packet.
func packet(_ data: some Collection<UInt8>) -> [UInt8] {
    var bytes: [UInt8] = [UInt8(ascii: "$")]
    bytes.reserveCapacity(data.count + 4)
    var sum: UInt8 = 0
    func add(_ byte: UInt8) {
        sum &+= byte
        bytes.append(byte)
    }
    for byte in data {
        switch byte {
        // The last one would begin a run length.
        case UInt8(ascii: "$"), UInt8(ascii: "#"), UInt8(ascii: "}"), UInt8(ascii: "*"):
            add(UInt8(ascii: "}"))
            add(byte ^ 0x20)
        default: add(byte)
        }
    }
    bytes += [UInt8(ascii: "#"), Hexadecimal.digit(sum >> 4), Hexadecimal.digit(sum & 15)]
    return bytes
}
