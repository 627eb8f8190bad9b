// SPDX-License-Identifier: Apache-2.0

import CLinux
@testable import DiskImage
import Glibc
import Linux
import Testing

/// An NBD server in this process that does to each request what a test says: it answers, says that it shuts down, or
/// closes the connection.
final class ScriptedNBDServer: @unchecked Sendable {
    enum Action {
        case answer, answerAndClose
        /// With NBD_ESHUTDOWN.
        case shutDown
        case ignore, close
    }

    /// What is done when the handshake of a connection is over (nil for its request), and for each request.
    typealias Script = @Sendable (_ connection: Int, _ request: Request?) -> Action

    enum Request: UInt16 {
        case read, write, disconnect, flush, trim, cache, zero
    }

    // Shared with the server's thread by way of the monitor: hence `Sendable`.
    private let monitor = Monitor()
    private var content: [UInt8]
    private var accepted = 0
    private var current: Int32 = -1
    private let minimumBlock: UInt32
    private let path: String
    private let listener: FileDescriptor
    private let script: Script
    private var thread: Slot?

    private final class Slot {
        let thread: Thread
        init(_ thread: consuming Thread) { self.thread = thread }
    }

    var address: String { "nbd+unix:///?socket=\(path)" }
    /// How many connections there were.
    var connections: Int { monitor.locked { accepted } }
    var bytes: [UInt8] { monitor.locked { content } }

    init(
        _ directory: TemporaryDirectory, _ content: [UInt8], minimumBlock: UInt32 = 1, _ script: @escaping Script
    )
        throws
    {
        path = directory.file("scripted")
        self.content = content
        self.minimumBlock = minimumBlock
        self.script = script
        listener = FileDescriptor(owning: socket(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0))
        let address = try #require(SocketAddress(unixPath: path)), number = listener.rawValue
        #expect(address.withAddress { bind(number, $0, $1) } == 0)
        #expect(listen(number, 16) == 0)
        // The thread may begin when the test is over: it holds the server until it ends.
        thread = Slot(try Thread.start(name: "nbd server") { self.serve() })
    }

    /// Ends the server; to be called before the value goes.
    func stop() {
        shutdown(listener.rawValue, Int32(SHUT_RDWR))
        // A client that is still connected loses its connection.
        monitor.locked { if current >= 0 { shutdown(current, Int32(SHUT_RDWR)) } }
        thread = nil
    }

    private func serve() {
        while true {
            let number = accept(listener.rawValue, nil, nil)
            guard number >= 0 else { return }
            let connection = FileDescriptor(owning: number)
            let index = monitor.locked {
                accepted += 1
                current = number
                return accepted - 1
            }
            _ = try? talk(connection, index)
            monitor.locked { current = -1 }
        }
    }

    private struct Gone: Error {}

    private func receive(_ connection: borrowing FileDescriptor, _ count: Int) throws -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        var done = 0
        while done < count {
            let got = bytes.withUnsafeMutableBytes {
                Glibc.recv(connection.rawValue, $0.baseAddress! + done, count - done, 0)
            }
            guard got > 0 else { throw Gone() }
            done += got
        }
        return bytes
    }

    private func send(_ connection: borrowing FileDescriptor, _ bytes: [UInt8]) throws {
        guard
            bytes.withUnsafeBytes({ Glibc.send(connection.rawValue, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL)) })
                == bytes.count
        else { throw Gone() }
    }

    /// A number as the network has it.
    private func big<Number: FixedWidthInteger>(_ number: Number) -> [UInt8] { littleEndian(number).reversed() }

    private func number<Number: FixedWidthInteger>(_ bytes: some Collection<UInt8>) -> Number {
        bytes.reduce(0) { $0 << 8 | Number($1) }
    }

    private func talk(_ connection: borrowing FileDescriptor, _ index: Int) throws {
        // Fixed newstyle, without the zeroes of old.
        try send(connection, Array("NBDMAGICIHAVEOPT".utf8) + big(3 as UInt16))
        _ = try receive(connection, 4)
        var isNegotiating = true
        while isNegotiating {
            let header = try receive(connection, 16)
            let option: UInt32 = number(header[8..<12])
            _ = try receive(connection, Int(number(header[12..<16]) as UInt32))
            func reply(_ type: UInt32, _ data: [UInt8] = []) throws {
                try send(
                    connection,
                    big(0x3e889045565a9 as UInt64) + big(option) + big(type) + big(UInt32(data.count)) + data)
            }
            guard option == 7 else {
                // Nothing else than NBD_OPT_GO is known: NBD_REP_ERR_UNSUP.
                try reply(1 << 31 | 1)
                continue
            }
            // The disk has flags and can be flushed.
            try reply(3, big(0 as UInt16) + big(UInt64(bytes.count)) + big(5 as UInt16))
            try reply(3, big(3 as UInt16) + big(minimumBlock) + big(4096 as UInt32) + big(32 << 20 as UInt32))
            try reply(1)
            isNegotiating = false
        }
        guard script(index, nil) == .answer else { return }
        while true {
            let header = try receive(connection, 28)
            guard let request = Request(rawValue: number(header[6..<8])), request != .disconnect else { return }
            let offset: UInt64 = number(header[16..<24]), length: UInt32 = number(header[24..<28])
            let place = Int(offset)..<Int(offset) + Int(length)
            let data = request == .write ? try receive(connection, Int(length)) : []
            let action = script(index, request)
            if action == .close { return }
            if action == .ignore { continue }
            var answer = big(0x67446698 as UInt32) + big(action == .shutDown ? 108 : 0 as UInt32) + header[8..<16]
            if action != .shutDown {
                monitor.locked {
                    if request == .write { content.replaceSubrange(place, with: data) }
                    if request == .read { answer += content[place] }
                }
            }
            try send(connection, answer)
            if action == .answerAndClose { return }
        }
    }
}
