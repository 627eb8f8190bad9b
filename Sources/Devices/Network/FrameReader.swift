// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import HostNetwork
internal import Linux
internal import Virtio

/// Takes frames out of a ``FrameStream``: what `readv` does for a TAP, one frame for each call, out of a buffer that
/// one system call fills with many.
///
/// It outlives the driver: a frame that has come in part when a driver is reset is the next one's to complete.
struct FrameReader: ~Copyable {
    enum Next: Equatable {
        /// A frame, which is in ``packet``.
        case frame
        /// There is no whole frame yet. The socket is readable when there is more of it.
        case none
        /// The peer has closed its end.
        case closed
        /// An impossible length: where the next frame begins is not known, now and for good.
        case lostFraming(length: UInt32)
    }

    /// Before the first length, so that a packet's header, which is longer than a length, fits before each frame.
    private static let margin = Int(PacketHeader.size) - FrameStream.lengthSize
    /// More than a UNIX socket holds by default, and several times the longest frame.
    static let capacity = 256 << 10

    private let socket: Int32
    private let buffer: Mapping
    /// Bytes that were received and not taken.
    private var start = margin
    private var end = margin
    /// The socket had nothing more at the last call.
    private var isDrained = false
    private var frame = margin..<margin

    init(socket: Int32) throws(SystemCallError) {
        self.socket = socket
        buffer = try Mapping(size: Self.capacity, flags: MAP_PRIVATE | MAP_ANONYMOUS)
    }

    /// Begins a turn: the socket may have more than in the one before.
    mutating func begin() { isDrained = false }

    /// Takes the next frame, with at most one successful system call.
    mutating func next() -> Next {
        if let length {
            guard FrameStream.possibleLengths.contains(length) else { return .lostFraming(length: length) }
            if takeFrame(Int(length)) { return .frame }
        }
        if isDrained { return .none }
        makeRoom()
        while true {
            let room = Self.capacity - end
            // `end` is within the mapping, and makeRoom leaves room behind it.
            let count = unsafe recv(socket, buffer.start + end, room, Int32(MSG_DONTWAIT))
            if count > 0 {
                end += count
                // More comes with the next event, if there is any.
                isDrained = count < room
                break
            }
            if count == 0 { return .closed }
            if errno == EINTR { continue }
            if errno != EAGAIN { return .closed }
            isDrained = true
            return .none
        }
        guard let length else { return .none }
        guard FrameStream.possibleLengths.contains(length) else { return .lostFraming(length: length) }
        return takeFrame(Int(length)) ? .frame : .none
    }

    /// The frame that was taken last, behind a header of zeros; valid until the next is.
    var packet: UnsafeRawBufferPointer {
        unsafe UnsafeRawBufferPointer(start: buffer.start + frame.lowerBound, count: frame.count)
    }

    /// Indicates whether the next call needs no system call: the socket may not become readable for it.
    var hasNext: Bool {
        guard let length else { return false }
        return !FrameStream.possibleLengths.contains(length) || end - start >= FrameStream.lengthSize + Int(length)
    }

    /// The length of the next frame, unchecked; nil if it has not come.
    private var length: UInt32? {
        guard end - start >= FrameStream.lengthSize else { return nil }
        // Four bytes that were received, private memory.
        return unsafe UInt32(bigEndian: buffer.start.loadUnaligned(fromByteOffset: start, as: UInt32.self))
    }

    /// - Returns: false if the frame has not come as a whole.
    private mutating func takeFrame(_ length: Int) -> Bool {
        let first = start + FrameStream.lengthSize, next = first + length
        guard next <= end else { return false }
        frame = first - Int(PacketHeader.size)..<next
        // Over its length, and what was before it: both are done with, or the margin.
        unsafe memset(buffer.start + frame.lowerBound, 0, Int(PacketHeader.size))
        start = next
        return true
    }

    /// Moves what there is of a frame to the front, unless the rest of it fits.
    private mutating func makeRoom() {
        if start == end {
            (start, end) = (Self.margin, Self.margin)
            return
        }
        let available = end - start
        let missing = FrameStream.lengthSize + Int(FrameStream.possibleLengths.upperBound) - available
        guard Self.capacity - end < missing else { return }
        unsafe memmove(buffer.start + Self.margin, buffer.start + start, available)
        (start, end) = (Self.margin, Self.margin + available)
    }
}
