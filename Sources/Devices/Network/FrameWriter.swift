// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import HostNetwork
internal import Linux

/// Gives frames to a ``FrameStream``: what `writev` does for a TAP, a whole frame or nothing.
///
/// What the socket does not take of a frame, its tail, is kept and sent before the next one. The tail outlives the
/// driver, or the peer would take the next frame for its end.
struct FrameWriter: ~Copyable {
    private let socket: Int32
    private let memory: Mapping
    private var tail = 0..<0

    init(socket: Int32) throws(SystemCallError) {
        self.socket = socket
        let size = FrameStream.lengthSize + Int(FrameStream.possibleLengths.upperBound)
        memory = try Mapping(size: size, flags: MAP_PRIVATE | MAP_ANONYMOUS)
    }

    /// Indicates whether the end of a frame waits until the socket is writable: then for ``flush()``.
    var hasTail: Bool { !tail.isEmpty }

    /// Sends the tail.
    /// - Returns: false while there is something left of it.
    mutating func flush() -> Bool {
        while !tail.isEmpty {
            let count = unsafe Glibc.send(
                socket, memory.start + tail.lowerBound, tail.count, Int32(MSG_DONTWAIT | MSG_NOSIGNAL))
            if count >= 0 {
                tail = tail.lowerBound + count..<tail.upperBound
            } else if errno == EAGAIN {
                return false
            } else if errno != EINTR {
                // There is nobody to complete the frame for.
                discardTail()
            }
        }
        return true
    }

    mutating func discardTail() { tail = 0..<0 }

    /// Sends the length of a frame and the frame, all or nothing.
    /// - Parameters:
    ///   - entries: the first is free, for the length; at least one is behind it.
    ///   - length: bytes of the frame, a possible length.
    /// - Returns: what `writev` does: the frame's length, or -1 with `errno`.
    mutating func write(_ entries: UnsafeMutablePointer<iovec>, count: Int, length: Int) -> Int {
        guard flush() else {
            errno = EAGAIN
            return -1
        }
        if length == EthernetPadding.shortestFrame { return unsafe writeShortest(entries, count: count) }
        var prefix = UInt32(truncatingIfNeeded: length).bigEndian
        return unsafe withUnsafeMutableBytes(of: &prefix) { bytes in
            unsafe entries.pointee = iovec(iov_base: bytes.baseAddress, iov_len: bytes.count)
            var message = unsafe msghdr()
            unsafe message.msg_iov = entries
            unsafe message.msg_iovlen = count
            let sent = unsafe sendmsg(socket, &message, Int32(MSG_DONTWAIT | MSG_NOSIGNAL))
            guard sent >= 0 else { return -1 }
            unsafe keep(entries, count: count, from: sent, total: bytes.count + length)
            return length
        }
    }

    /// Sends a frame of the shortest length that Ethernet has, without what its sender has filled it up with: passt of
    /// Debian 12 drops an IP packet that does not end with its frame.
    private mutating func writeShortest(_ entries: UnsafeMutablePointer<iovec>, count: Int) -> Int {
        // A copy, which the guest cannot change any more, where a tail would be.
        unsafe entries.pointee = iovec(iov_base: memory.start, iov_len: FrameStream.lengthSize)
        unsafe keep(entries, count: count, from: 0, total: FrameStream.lengthSize + EthernetPadding.shortestFrame)
        let frame = unsafe UnsafeRawBufferPointer(
            start: memory.start + FrameStream.lengthSize, count: tail.upperBound - FrameStream.lengthSize)
        let length = unsafe EthernetPadding.length(ofPacketIn: frame)
        unsafe memory.start.storeBytes(of: UInt32(truncatingIfNeeded: length).bigEndian, as: UInt32.self)
        tail = 0..<FrameStream.lengthSize + length
        let sent = unsafe Glibc.send(socket, memory.start, tail.count, Int32(MSG_DONTWAIT | MSG_NOSIGNAL))
        guard sent >= 0 else {
            discardTail()
            return -1
        }
        tail = sent..<tail.upperBound
        return EthernetPadding.shortestFrame
    }

    /// Keeps the bytes of a frame from `sent` on, which the guest may change until then: they are its own.
    private mutating func keep(_ entries: UnsafeMutablePointer<iovec>, count: Int, from sent: Int, total: Int) {
        guard sent < total else { return }
        var skip = sent, end = 0
        for index in 0..<count {
            let entry = unsafe entries[index]
            let length = unsafe entry.iov_len
            if skip >= length {
                skip -= length
                continue
            }
            let piece = min(length - skip, memory.size - end)
            // From a checked buffer of the guest's, or the prefix, to memory that has room.
            if let base = unsafe entry.iov_base { unsafe clinux_copy(memory.start + end, base + skip, piece) }
            end += piece
            skip = 0
        }
        tail = 0..<end
    }
}
