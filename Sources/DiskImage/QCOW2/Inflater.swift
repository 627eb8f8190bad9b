// SPDX-License-Identifier: Apache-2.0

internal import CZlib

/// Deflate streams, raw as qcow2 keeps compressed clusters or with zlib's header as VMDK keeps grains, decompressed one
/// at a time with one reused state.
struct Inflater: ~Copyable {
    private let state: ZlibState

    /// - Parameter windowBits: zlib's. A negative one means no zlib header; 2^12 bytes is qcow2's window.
    /// Returns nil when there is no memory for zlib's state.
    init?(windowBits: Int32 = -12) {
        // zlib gets its own state.
        let state = unsafe ZlibState(end: { unsafe inflateEnd($0) }) {
            unsafe inflateInit2_($0, windowBits, ZLIB_VERSION, Int32(MemoryLayout<z_stream>.size))
        }
        guard let state else { return nil }
        self.state = state
    }

    /// Decompresses `input` until `output` is full, and not a byte further.
    /// - Returns: whether it could be filled.
    func inflate(_ input: IOMemory, into output: IOMemory) -> Bool { decompress(input, into: output) == output.count }

    /// Decompresses `input` until it ends or `output` is full.
    /// - Returns: bytes of output; nil if the input is invalid or truncated.
    func decompress(_ input: IOMemory, into output: IOMemory) -> Int? {
        // As above. What it has not used of the input is padding up to a sector.
        guard
            let (status, count) = unsafe state.run(
                input, into: output, reset: { unsafe inflateReset($0) }, { unsafe CZlib.inflate($0, Z_FINISH) })
        else { return nil }
        return status == Z_STREAM_END || (status == Z_BUF_ERROR && count == output.count) ? count : nil
    }
}

/// The state of a stream of zlib's, which stays where it is, as zlib has pointers to it.
@safe final class ZlibState {
    private let stream: UnsafeMutablePointer<z_stream>
    private var end: (UnsafeMutablePointer<z_stream>) -> Int32

    /// - Parameters:
    ///   - end: releases what `start` has allocated.
    ///   - start: prepares the state.
    /// Returns nil when it cannot be prepared.
    init?(end: @escaping (UnsafeMutablePointer<z_stream>) -> Int32, _ start: (UnsafeMutablePointer<z_stream>) -> Int32)
    {
        // One element, released in `deinit`.
        unsafe stream = .allocate(capacity: 1)
        unsafe stream.initialize(to: z_stream())
        unsafe self.end = end
        guard unsafe start(stream) == Z_OK else {
            unsafe self.end = { _ in Z_OK }
            return nil
        }
    }

    deinit {
        // This is the only owner.
        _ = unsafe end(stream)
        unsafe stream.deallocate()
    }

    /// Works on all of an input. zlib reads and writes within the two pieces.
    /// - Returns: what `work` says, and bytes of output; nil when the state cannot be used again.
    func run(
        _ input: IOMemory, into output: IOMemory, reset: (UnsafeMutablePointer<z_stream>) -> Int32,
        _ work: (UnsafeMutablePointer<z_stream>) -> Int32
    ) -> (status: Int32, count: Int)? {
        guard unsafe reset(stream) == Z_OK else { return nil }
        // The two pieces, as long as they say.
        unsafe stream.pointee.next_in = input.start.assumingMemoryBound(to: UInt8.self)
        unsafe stream.pointee.avail_in = UInt32(clamping: input.count)
        unsafe stream.pointee.next_out = output.start.assumingMemoryBound(to: UInt8.self)
        unsafe stream.pointee.avail_out = UInt32(clamping: output.count)
        let status = unsafe work(stream)
        return (status, output.count - Int(unsafe stream.pointee.avail_out))
    }
}
