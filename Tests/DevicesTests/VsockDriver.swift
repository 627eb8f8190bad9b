// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import GuestMemory
import Linux
import TestSupport
import Testing
@testable import Devices
@testable import Virtio

/// A directory with the sockets of a test; removed with it.
final class SocketDirectory {
    let path: String

    init() throws {
        var template = Array("/tmp/vsock-test.XXXXXX".utf8CString)
        let made = template.withUnsafeMutableBufferPointer { mkdtemp($0.baseAddress!) != nil }
        try #require(made)
        path = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    /// The path that the device gets.
    var vsock: String { path + "/v.sock" }

    deinit {
        guard let directory = opendir(path) else { return }
        while let entry = readdir(directory) {
            let name = withUnsafeBytes(of: entry.pointee.d_name) {
                String(cString: $0.baseAddress!.assumingMemoryBound(to: CChar.self))
            }
            unlink(path + "/" + name)
        }
        closedir(directory)
        rmdir(path)
    }
}

/// A UNIX stream socket of the host's.
final class HostSocket {
    let number: Int32
    private var isOpen = true

    init(_ number: Int32) { self.number = number }

    private static func withAddress(_ path: String, _ body: (UnsafePointer<sockaddr>, socklen_t) -> Int32) -> Int32 {
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: Array(path.utf8)) }
        return withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                body($0, socklen_t(MemoryLayout<sockaddr_un>.size))
            }
        }
    }

    private static func make() throws -> HostSocket {
        let number = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
        try #require(number >= 0)
        return HostSocket(number)
    }

    static func listening(_ path: String, backlog: Int32 = 128) throws -> HostSocket {
        let socket = try make()
        try #require(withAddress(path) { bind(socket.number, $0, $1) } == 0)
        try #require(listen(socket.number, backlog) == 0)
        return socket
    }

    static func connected(_ path: String) throws -> HostSocket {
        let socket = try make()
        try #require(withAddress(path) { connect(socket.number, $0, $1) } == 0)
        return socket
    }

    /// Connects without waiting, also afterwards; nil where that is refused, or too many connections wait already.
    static func connectedNow(_ path: String) -> HostSocket? {
        let kind = Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue)
        let socket = HostSocket(Glibc.socket(AF_UNIX, kind, 0))
        return withAddress(path) { connect(socket.number, $0, $1) } == 0 ? socket : nil
    }

    func accept() throws -> HostSocket {
        let client = Glibc.accept(number, nil, nil)
        try #require(client >= 0)
        return HostSocket(client)
    }

    func write(_ bytes: [UInt8]) throws {
        var rest = bytes[...]
        while !rest.isEmpty {
            let count = rest.withUnsafeBytes { Glibc.send(number, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL)) }
            try #require(count > 0)
            rest = rest.dropFirst(count)
        }
    }

    func write(_ text: String) throws { try write(Array(text.utf8)) }

    /// Sends what a peer that may have closed takes.
    func send(_ text: String) {
        _ = Array(text.utf8).withUnsafeBytes { Glibc.send(number, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL)) }
    }

    /// As many bytes as given; fewer at the end.
    func read(_ count: Int) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count), done = 0
        while done < count {
            let got = bytes.withUnsafeMutableBytes {
                recv(number, $0.baseAddress! + done, count - done, 0)
            }
            guard got > 0 else { break }
            done += got
        }
        return Array(bytes[..<done])
    }

    /// Indicates whether nothing is there to be read, the end included.
    var isQuiet: Bool {
        var byte: UInt8 = 0
        return recv(number, &byte, 1, Int32(MSG_PEEK | MSG_DONTWAIT)) < 0 && errno == EAGAIN
    }

    /// Indicates whether the end has come, without bytes before it.
    var isAtEnd: Bool { read(1).isEmpty }

    func endSending() { shutdown(number, Int32(SHUT_WR)) }
    func end() {
        guard isOpen else { return }
        isOpen = false
        close(number)
    }

    deinit { end() }
}

/// A packet as a driver sees it.
struct VsockPacket {
    var header: VsockHeader
    var data: [UInt8] = []

    var operation: VsockHeader.Operation? { VsockHeader.Operation(rawValue: header.operation) }
}

/// The driver of a vsock device, which does what the test asks, right or wrong.
final class VsockDriver: QueueDriver {
    static let receive = 0, transmit = 1, event = 2
    static let cid: UInt32 = 3
    /// Where packets to send are; receive buffers are before, at ``QueueDriver/data``.
    private static let outgoing: UInt64 = 0x80_0000
    private static let events: UInt64 = 0x70_0000

    let device: VsockDevice
    let directory: SocketDirectory
    let lines = Lines()
    private var offered: [(head: UInt32, address: UInt64)] = []
    private var nextBuffer: UInt64 = 0
    let bufferSize: Int
    let started: FeatureSet
    /// The driver's own buffer, as its packets tell it.
    var window: UInt32 = 1 << 20

    init(_ features: FeatureSet = .version1, bufferSize: Int = 4096 + 44) throws {
        let directory = try SocketDirectory()
        let socket = try HostSocket.listening(directory.vsock)
        let listener = FileDescriptor(owning: withExtendedLifetime(socket) { dup($0.number) })
        try listener.setNonBlocking(true)
        device = try VsockDevice(
            name: "vsock0", guestCID: Self.cid, path: directory.vsock, listener: listener,
            events: DeviceEvents(log: lines.add))
        self.directory = directory
        self.bufferSize = bufferSize
        started = features
        try super.init(driving: device, features: features, queues: 3)
    }

    /// Resets the device and begins anew, without buffers.
    func restart() throws {
        offered = []
        ready = 0
        try start(started)
    }

    func listen(_ port: UInt32, backlog: Int32 = 128) throws -> HostSocket {
        try .listening("\(directory.vsock)_\(port)", backlog: backlog)
    }

    /// Packets that have come and were not taken yet.
    private var ready = 0

    /// Waits for packets, of which several may come at a time.
    private func awaitPackets() throws {
        guard !started.contains(.packedRing) else {
            try wait(for: 1)
            return ready = 1
        }
        while try usedCount() == 0 { transport.irqfd.event.wait() }
        ready = try usedCount()
        try wait(for: ready)
    }

    /// Indicates whether a packet has come.
    var hasPacket: Bool {
        get throws {
            queue = Self.receive
            return try ready > 0 || usedCount() > 0
        }
    }

    // MARK: Packets

    /// Offers receive buffers, without a kick.
    func offerBuffers(_ count: Int, size: Int? = nil) throws {
        queue = Self.receive
        for _ in 0..<count {
            let address = Self.data + nextBuffer * 0x2_0000
            nextBuffer = (nextBuffer + 1) % 48
            // The header apart, as Linux has it.
            let rest = (size ?? bufferSize) - 44
            let buffers =
                [Buffer(address: address, length: 44 + min(0, rest), isWritable: true)]
                + (rest > 0 ? [Buffer(address: address + 44, length: rest, isWritable: true)] : [])
            offered.append((try offer(buffers), address))
        }
    }

    func provide(_ count: Int) throws {
        try offerBuffers(count)
        queue = Self.receive
        kick()
    }

    /// The next packet, and its buffer again.
    func next(replacing: Bool = true) throws -> VsockPacket {
        queue = Self.receive
        if ready == 0 { try awaitPackets() }
        ready -= 1
        let (head, address) = offered.removeFirst()
        let count = Int(written[head] ?? 0)
        let bytes = try ram.readBytes(at: GuestAddress(address), count: count)
        let packet = try #require(Self.packet(bytes))
        if replacing { try provide(1) }
        return packet
    }

    private static func packet(_ bytes: [UInt8]) -> VsockPacket? {
        guard bytes.count >= 44 else { return nil }
        func word(_ offset: Int) -> UInt32 { (0..<4).reduce(0) { $0 | UInt32(bytes[offset + $1]) << UInt32(8 * $1) } }
        func long(_ offset: Int) -> UInt64 { UInt64(word(offset)) | UInt64(word(offset + 4)) << 32 }
        var header = VsockHeader(.data, from: long(0), port: word(16), to: long(8), port: word(20))
        header.length = word(24)
        header.type = UInt16(truncatingIfNeeded: word(28))
        header.operation = UInt16(truncatingIfNeeded: word(28) >> 16)
        (header.flags, header.bufferSize, header.forwarded) = (word(32), word(36), word(40))
        guard Int(header.length) == bytes.count - 44 else { return nil }
        return VsockPacket(header: header, data: Array(bytes[44...]))
    }

    func header(_ operation: VsockHeader.Operation, port: UInt32, to hostPort: UInt32) -> VsockHeader {
        var header = VsockHeader(operation, from: UInt64(Self.cid), port: port, to: 2, port: hostPort)
        header.bufferSize = window
        return header
    }

    static func bytes(_ header: VsockHeader) -> [UInt8] {
        let words: [UInt32] = [
            UInt32(truncatingIfNeeded: header.source), UInt32(truncatingIfNeeded: header.source >> 32),
            UInt32(truncatingIfNeeded: header.destination), UInt32(truncatingIfNeeded: header.destination >> 32),
            header.sourcePort, header.destinationPort, header.length,
            UInt32(header.type) | UInt32(header.operation) << 16, header.flags, header.bufferSize, header.forwarded,
        ]
        return words.flatMap { word in (0..<4).map { UInt8(truncatingIfNeeded: word >> UInt32(8 * $0)) } }
    }

    /// Sends bytes as one chain, and waits until the device has taken it.
    func send(raw bytes: [UInt8], cut: Int = 44) throws {
        queue = Self.transmit
        try ram.write(bytes, at: GuestAddress(Self.outgoing))
        let first = min(cut, bytes.count)
        var buffers = [Buffer(address: Self.outgoing, length: first, isWritable: false)]
        if bytes.count > first {
            buffers.append(
                Buffer(address: Self.outgoing + UInt64(first), length: bytes.count - first, isWritable: false))
        }
        _ = try offer(buffers)
        kick()
        try wait(for: 1)
    }

    func send(_ header: VsockHeader, _ data: [UInt8] = []) throws {
        var header = header
        if header.length == 0 { header.length = UInt32(data.count) }
        try send(raw: Self.bytes(header) + data)
    }

    func send(
        _ operation: VsockHeader.Operation, port: UInt32, to hostPort: UInt32, flags: UInt32 = 0,
        forwarded: UInt32 = 0, _ data: [UInt8] = []
    ) throws {
        var header = header(operation, port: port, to: hostPort)
        header.flags = flags
        header.forwarded = forwarded
        try send(header, data)
    }

    /// Connects the guest's port to a listener of the host's.
    func connect(_ port: UInt32, to hostPort: UInt32, _ listener: HostSocket) throws -> HostSocket {
        try send(.request, port: port, to: hostPort)
        var answer = try next()
        // Others are about connections that programs of the host have requested.
        while answer.header.destinationPort != port { answer = try next() }
        try #require(answer.operation == .response && answer.header.sourcePort == hostPort)
        return try listener.accept()
    }

    /// Data of packets until there are as many bytes; other packets are dropped.
    func receive(_ count: Int, port: UInt32) throws -> [UInt8] {
        var data: [UInt8] = []
        while data.count < count {
            let packet = try next()
            try #require(packet.operation == .data && packet.header.destinationPort == port)
            data += packet.data
        }
        return data
    }

    // MARK: Events

    /// Offers a buffer of the event queue, without a kick.
    func offerEvent(_ length: Int = 4) throws -> UInt32 {
        queue = Self.event
        try ram.fill(at: GuestAddress(Self.events), count: 8, with: 0xee)
        return try offer([Buffer(address: Self.events, length: length, isWritable: true)])
    }

    func event() throws -> UInt32 { try ram.readUInt32(at: GuestAddress(Self.events)) }
}
