// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import Linux

/// A non-blocking connection to a UNIX socket.
func connect(toSocket path: String) throws -> FileDescriptor {
    let descriptor = try makeSocket(AF_UNIX)
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8) }
    try connect(descriptor, to: address)
    return descriptor
}

/// A non-blocking connection to a TCP port of this host.
func connect(toPort port: UInt16) throws -> FileDescriptor {
    let descriptor = try makeSocket(AF_INET)
    var address = sockaddr_in()
    address.sin_family = sa_family_t(AF_INET)
    address.sin_port = port.bigEndian
    address.sin_addr.s_addr = in_addr_t(0x7f00_0001).bigEndian
    do { try connect(descriptor, to: address) } catch let error as SystemCallError where error.errno == EINPROGRESS {}
    return descriptor
}

private func makeSocket(_ family: Int32) throws -> FileDescriptor {
    let number = socket(family, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue), 0)
    guard number >= 0 else { throw SystemCallError.last("socket") }
    return FileDescriptor(owning: number)
}

private func connect<Address>(_ descriptor: borrowing FileDescriptor, to address: Address) throws {
    let number = descriptor.rawValue
    let result = withUnsafePointer(to: address) {
        $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
            Glibc.connect(number, $0, socklen_t(MemoryLayout<Address>.size))
        }
    }
    guard result == 0 else { throw SystemCallError.last("connect") }
}

/// A debugger that says just what a test tells it to.
final class DebugConnection {
    private let descriptor: FileDescriptor
    private var transcript = Transcript()

    init(_ descriptor: consuming FileDescriptor) { self.descriptor = descriptor }

    /// Ends the connection for sure: a program that another test starts at this moment has a copy of the descriptor
    /// until its exec.
    deinit { shutdown(descriptor.rawValue, Int32(SHUT_RDWR)) }

    /// Sends bytes as they are.
    func send(_ bytes: [UInt8]) throws {
        var rest = bytes[...]
        while !rest.isEmpty {
            let count = rest.withUnsafeBytes {
                Glibc.send(descriptor.rawValue, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL))
            }
            if count > 0 {
                rest = rest.dropFirst(count)
            } else if errno == EAGAIN {
                wait(for: POLLOUT)
            } else {
                throw SystemCallError.last("send")
            }
        }
    }

    /// Sends a packet.
    func put(_ text: String) throws {
        let sum = text.utf8.reduce(UInt8(0)) { $0 &+ $1 }
        let digits = String(UInt16(sum) + 0x100, radix: 16).dropFirst()
        try send(Array("$\(text)#\(digits)".utf8))
    }

    /// The data of the next packet that comes.
    func next() throws -> String {
        for _ in 0..<9_000 {
            let goesOn = transcript.read(from: descriptor.rawValue)
            if let data = transcript.nextPacket() { return data }
            if !goesOn { throw TestFailure("the debugger's connection has ended; it brought: \(transcript.tail)") }
            wait(for: POLLIN)
        }
        throw TestFailure("the debugger has no answer; the connection brought: \(transcript.tail)")
    }

    /// Sends a packet and takes the answer.
    func ask(_ text: String) throws -> String {
        try put(text)
        return try next()
    }

    /// Whether the other side closes.
    func isAtEnd() -> Bool {
        for _ in 0..<9_000 {
            if !transcript.read(from: descriptor.rawValue) { return true }
            wait(for: POLLIN)
        }
        return false
    }

    private func wait(for events: Int32) {
        var entry = pollfd(fd: descriptor.rawValue, events: Int16(events), revents: 0)
        poll(&entry, 1, 10)
    }
}

extension Transcript {
    /// The data between the next `$` and `#`, if both are there.
    fileprivate mutating func nextPacket() -> String? {
        let start = position
        guard advance(past: "$") else { return nil }
        let first = position
        guard advance(past: "#") else {
            position = start
            return nil
        }
        return String(decoding: bytes[first..<position - 1], as: UTF8.self)
    }
}
