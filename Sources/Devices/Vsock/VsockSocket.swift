// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux
internal import Virtio

/// The sockets of the host that a guest's ports are: `PATH_PORT`.
struct VsockAddress: BitwiseCopyable {
    private var address = sockaddr_un()
    private let prefixLength: Int

    /// The longest path, so that every port's has room in `sun_path`.
    static let longestPath = 107 - 1 - 10

    /// - Parameter path: at most ``longestPath`` bytes; of a longer one, the beginning.
    init(path: String) {
        address.sun_family = sa_family_t(AF_UNIX)
        let bytes = Array(path.rawBytes.prefix(Self.longestPath)) + [UInt8(ascii: "_")]
        prefixLength = bytes.count
        // At most 97 of 108 bytes.
        unsafe withUnsafeMutableBytes(of: &address.sun_path) { unsafe $0.copyBytes(from: bytes) }
    }

    /// Connects a socket, which does not block, to a port's.
    /// - Returns: 0, or an errno value; `EAGAIN` when the listener's backlog is full.
    mutating func connect(_ socket: Int32, toPort port: UInt32) -> Int32 {
        let prefixLength = prefixLength
        // At most 97 bytes, 10 digits and a NUL, of 108.
        unsafe withUnsafeMutableBytes(of: &address.sun_path) { place in
            var digits = InlineArray<10, UInt8>(repeating: 0)
            var count = 0, rest = port
            repeat {
                digits[count] = UInt8(ascii: "0") + UInt8(rest % 10)
                rest /= 10
                count += 1
            } while rest > 0
            for index in 0..<count { unsafe place[prefixLength + index] = digits[count - 1 - index] }
            unsafe place[prefixLength + count] = 0
        }
        let length = socklen_t(MemoryLayout<sockaddr_un>.size)
        while true {
            // Every kind of socket address begins as `sockaddr` does.
            let status = unsafe withUnsafePointer(to: address) {
                unsafe $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                    unsafe Glibc.connect(socket, $0, length)
                }
            }
            if status == 0 { return 0 }
            if errno != EINTR { return errno }
        }
    }
}

/// Calls on a stream socket that does not block. They own nothing.
enum VsockSocket {
    /// What a call has moved.
    enum Moved {
        /// More than none.
        case bytes(Int)
        /// The socket takes, or has, nothing for now.
        case none
        /// The other end has closed its sending side.
        case end
        /// The connection is no more.
        case lost
    }

    /// A new socket, or a negative errno value.
    static func make() -> Int32 {
        let number = socket(
            AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue), 0)
        return number >= 0 ? number : -errno
    }

    static func shutdown(_ socket: Int32, _ direction: Int) { _ = Glibc.shutdown(socket, Int32(direction)) }

    /// Sends what the buffers have, as far as the socket takes it.
    static func send(_ socket: Int32, _ buffers: IOVectors) -> Moved {
        guard !buffers.isEmpty else { return .none }
        // The list is as long as its count says, and valid for the call.
        return unsafe send(socket, buffers.base, buffers.count)
    }

    /// Sends bytes of this process's own.
    static func send(_ socket: Int32, _ bytes: UnsafeRawBufferPointer) -> Moved {
        guard unsafe !bytes.isEmpty else { return .none }
        // Only read; valid for the call.
        var vector = unsafe iovec(iov_base: UnsafeMutableRawPointer(mutating: bytes.baseAddress), iov_len: bytes.count)
        return unsafe send(socket, &vector, 1)
    }

    private static func send(_ socket: Int32, _ vectors: UnsafeMutablePointer<iovec>, _ count: Int) -> Moved {
        var message = unsafe msghdr()
        unsafe message.msg_iov = vectors
        unsafe message.msg_iovlen = count
        while true {
            let sent = unsafe sendmsg(socket, &message, Int32(MSG_DONTWAIT | MSG_NOSIGNAL))
            if sent > 0 { return .bytes(sent) }
            if sent == 0 || errno == EAGAIN || errno == ENOBUFS || errno == ENOMEM { return .none }
            if errno != EINTR { return .lost }
        }
    }

    /// Receives into buffers of the guest's.
    static func receive(_ socket: Int32, _ buffers: IOVectors) -> Moved {
        while true {
            // Checked guest RAM; the kernel writes into it, and returns an error if it cannot.
            let count = unsafe readv(socket, buffers.base, Int32(buffers.count))
            if count > 0 { return .bytes(count) }
            if count == 0 { return .end }
            if errno == EAGAIN || errno == ENOMEM { return .none }
            if errno != EINTR { return .lost }
        }
    }

    /// The bytes at the front of what has come; they stay there.
    static func peek(_ socket: Int32, _ bytes: UnsafeMutableRawBufferPointer) -> Moved {
        unsafe receive(socket, bytes, MSG_PEEK)
    }

    /// Takes bytes off the front.
    static func take(_ socket: Int32, _ bytes: UnsafeMutableRawBufferPointer) -> Moved {
        unsafe receive(socket, bytes, 0)
    }

    private static func receive(_ socket: Int32, _ bytes: UnsafeMutableRawBufferPointer, _ flags: Int) -> Moved {
        while true {
            // The kernel writes within the buffer, which is valid for the call.
            let count = unsafe recv(socket, bytes.baseAddress, bytes.count, Int32(flags) | Int32(MSG_DONTWAIT))
            if count > 0 { return .bytes(count) }
            if count == 0 { return .end }
            if errno == EAGAIN { return .none }
            if errno != EINTR { return .lost }
        }
    }
}

/// What a client of the host begins with: `CONNECT PORT` and a newline.
enum VsockCommand: Equatable {
    /// A whole line of `length` bytes, which asks for a port of the guest's.
    case connect(port: UInt32, length: Int)
    /// The line may still be completed.
    case incomplete
    /// Anything else.
    case invalid

    /// The longest line, with its newline.
    static let longest = 32

    /// - Parameter bytes: those that have come, at most ``longest``. The word is accepted in any case, words are
    ///   separated by one or more blanks, and what follows the port is ignored, as by Firecracker.
    init(_ bytes: Span<UInt8>) {
        let newline = bytes.indices.first { bytes[$0] == UInt8(ascii: "\n") }
        guard let newline else {
            self = bytes.count < Self.longest ? .incomplete : .invalid
            return
        }
        self = .invalid
        let word: StaticString = "connect"
        var index = Self.skipBlanks(bytes, from: 0, to: newline)
        guard newline - index > word.utf8CodeUnitCount else { return }
        for offset in 0..<word.utf8CodeUnitCount {
            // Within the word, whose bytes live as long as the program.
            let letter = unsafe word.utf8Start[offset]
            guard bytes[index + offset] | 0x20 == letter else { return }
        }
        index += word.utf8CodeUnitCount
        let first = Self.skipBlanks(bytes, from: index, to: newline)
        guard first > index, first < newline else { return }
        var port: UInt32 = 0
        index = first
        while index < newline, !Self.isBlank(bytes[index]) {
            guard (UInt8(ascii: "0")...UInt8(ascii: "9")).contains(bytes[index]) else { return }
            let (product, overflow) = port.multipliedReportingOverflow(by: 10)
            let (sum, carry) = product.addingReportingOverflow(UInt32(bytes[index] - UInt8(ascii: "0")))
            guard !overflow, !carry else { return }
            port = sum
            index += 1
        }
        self = .connect(port: port, length: newline + 1)
    }

    private static func isBlank(_ byte: UInt8) -> Bool {
        byte == UInt8(ascii: " ") || byte == UInt8(ascii: "\t") || byte == UInt8(ascii: "\r")
    }

    private static func skipBlanks(_ bytes: Span<UInt8>, from first: Int, to end: Int) -> Int {
        var index = first
        while index < end, isBlank(bytes[index]) { index += 1 }
        return index
    }
}
