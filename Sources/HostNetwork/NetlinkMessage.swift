// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// A netlink message that grows: header, fixed part, attributes, each aligned to 4 bytes (netlink(7)).
struct NetlinkMessage {
    private(set) var bytes: [UInt8]

    /// - Parameters:
    ///   - type: `RTM_…`.
    ///   - flags: `NLM_F_…`; `NLM_F_REQUEST` is added.
    init(type: Int, flags: Int32, fixedPart: some BitwiseCopyable) {
        let header = nlmsghdr(
            nlmsg_len: 0, nlmsg_type: UInt16(truncatingIfNeeded: type),
            nlmsg_flags: UInt16(truncatingIfNeeded: flags | NLM_F_REQUEST), nlmsg_seq: 0, nlmsg_pid: 0)
        bytes = []
        append(header)
        append(fixedPart)
    }

    /// Adds an attribute whose payload is `payload`.
    mutating func append(attribute type: Int, _ payload: some Collection<UInt8>) {
        append(
            rtattr(
                rta_len: UInt16(truncatingIfNeeded: 4 + payload.count), rta_type: UInt16(truncatingIfNeeded: type)))
        bytes += payload
        align()
    }

    /// Adds an attribute that is an integer in the host's byte order.
    mutating func append(attribute type: Int, number: UInt32) {
        append(attribute: type, (0..<4).map { UInt8(truncatingIfNeeded: number >> (8 * $0)) })
    }

    /// Adds an attribute that is a NUL-terminated string.
    mutating func append(attribute type: Int, string: String) {
        append(attribute: type, Array(string.utf8) + [0])
    }

    /// Adds an attribute whose payload is the attributes that `body` adds.
    mutating func append(nested type: Int, _ body: (inout NetlinkMessage) -> Void) {
        let start = bytes.count
        append(rtattr(rta_len: 0, rta_type: UInt16(truncatingIfNeeded: type)))
        body(&self)
        store(UInt16(truncatingIfNeeded: bytes.count - start), at: start)
    }

    /// Fills in length and sequence number: the message is complete.
    mutating func fillHeader(sequence: UInt32) {
        store(UInt32(truncatingIfNeeded: bytes.count), at: 0)
        store(sequence, at: 8)
    }

    private mutating func append(_ value: some BitwiseCopyable) {
        // The kernel's fixed structures have no padding, so every byte copied is initialized.
        unsafe withUnsafeBytes(of: value) { unsafe bytes += $0 }
        align()
    }

    private mutating func align() {
        while bytes.count % 4 != 0 { bytes.append(0) }
    }

    private mutating func store(_ value: some FixedWidthInteger, at offset: Int) {
        for index in 0..<(value.bitWidth / 8) {
            bytes[offset + index] = UInt8(truncatingIfNeeded: value >> (8 * index))
        }
    }
}

/// Received bytes, read in the host's byte order; nil where they end too soon.
struct NetlinkBytes {
    let bytes: ArraySlice<UInt8>

    var count: Int { bytes.count }

    func load<Value: FixedWidthInteger>(_ type: Value.Type = Value.self, at offset: Int) -> Value? {
        let size = Value.bitWidth / 8
        guard offset >= 0, offset <= count - size else { return nil }
        return (0..<size).reduce(0) {
            $0 | Value(truncatingIfNeeded: bytes[bytes.startIndex + offset + $1]) << (8 * $1)
        }
    }

    /// The bytes from `offset` up to `end`, or to the end.
    func slice(from offset: Int, to end: Int? = nil) -> NetlinkBytes? {
        let end = end ?? count
        guard offset >= 0, offset <= end, end <= count else { return nil }
        return NetlinkBytes(bytes: bytes[(bytes.startIndex + offset)..<(bytes.startIndex + end)])
    }

    /// Takes the message at the front of a datagram; nil at its end, and at a length that leaves it.
    mutating func nextMessage() -> ReceivedMessage? {
        guard let length = load(UInt32.self, at: 0), let message = slice(from: 0, to: Int(length)),
            let type = message.load(UInt16.self, at: 4),
            let flags = message.load(UInt16.self, at: 6), let sequence = message.load(UInt32.self, at: 8),
            let payload = message.slice(from: 16)
        else { return nil }
        self = slice(from: (Int(length) + 3) & ~3) ?? NetlinkBytes(bytes: [])
        return ReceivedMessage(type: Int(type), flags: flags, sequence: sequence, payload: payload)
    }

    /// The bytes before the first NUL as text.
    var string: String { String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self) }

    /// The payload of the first attribute of a type in this run of attributes.
    /// A length that leaves the run ends the search.
    func attribute(_ type: Int) -> NetlinkBytes? {
        var offset = 0
        while let length = load(UInt16.self, at: offset), let found = load(UInt16.self, at: offset + 2) {
            guard length >= 4, let payload = slice(from: offset + 4, to: offset + Int(length)) else { return nil }
            // The two top bits say "nested" and "network byte order" (NLA_TYPE_MASK).
            if Int(found & 0x3fff) == type { return payload }
            offset += (Int(length) + 3) & ~3
        }
        return nil
    }
}

/// A message from the kernel, without its header.
struct ReceivedMessage {
    /// `RTM_…` or `NLMSG_…`.
    let type: Int
    /// `NLM_F_…`.
    let flags: UInt16
    /// The request's that it answers.
    let sequence: UInt32
    let payload: NetlinkBytes
}

/// One datagram from the kernel.
/// - Throws: `EAGAIN` from a non-blocking socket that has none, `ENOBUFS` when some were lost.
func receiveFromKernel(_ socket: borrowing FileDescriptor) throws(SystemCallError) -> [UInt8] {
    // The kernel's dumps come in pieces of at most 32 KiB (netlink_dump), single messages are smaller.
    let capacity = 64 << 10
    while true {
        var sender = sockaddr_nl()
        var senderSize = socklen_t(MemoryLayout<sockaddr_nl>.size)
        var count = 0
        // The kernel writes at most the counts that are passed with the buffer and the address. What it does not write
        // stays untouched memory.
        let buffer = unsafe [UInt8](unsafeUninitializedCapacity: capacity) { bytes, initialized in
            count = unsafe withUnsafeMutablePointer(to: &sender) { address in
                unsafe address.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                    unsafe recvfrom(socket.rawValue, bytes.baseAddress, capacity, Int32(MSG_TRUNC), $0, &senderSize)
                }
            }
            initialized = min(max(0, count), capacity)
        }
        if count < 0 {
            let error = SystemCallError.last("recvfrom")
            if error.errno == EINTR { continue }
            throw error
        }
        if count > capacity { throw SystemCallError("recvfrom", errno: EMSGSIZE) }
        // Any process may send to this socket; only the kernel has port number 0.
        if sender.nl_pid == 0 { return Array(buffer[...]) }
    }
}
