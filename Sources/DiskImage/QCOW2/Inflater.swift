// SPDX-License-Identifier: Apache-2.0

internal import CZlib

/// Deflate streams, raw as qcow2 keeps compressed clusters or with zlib's header as VMDK keeps grains, decompressed one at a time with one
/// reused state.
@safe struct Inflater: ~Copyable {
    private let stream: UnsafeMutablePointer<z_stream>

    /// - Parameter windowBits: zlib's. A negative one means no zlib header; 2^12 bytes is qcow2's window.
    /// Returns nil when there is no memory for zlib's state.
    init?(windowBits: Int32 = -12) {
        unsafe stream = .allocate(capacity: 1)
        unsafe stream.initialize(to: z_stream())
        let status = unsafe inflateInit2_(stream, windowBits, ZLIB_VERSION, Int32(MemoryLayout<z_stream>.size))
        guard status == Z_OK else {
            unsafe stream.deallocate()
            return nil
        }
    }

    deinit {
        unsafe inflateEnd(stream)
        unsafe stream.deallocate()
    }

    /// Decompresses `input` until `output` is full, and not a byte further.
    /// - Returns: whether it could be filled.
    func inflate(_ input: UnsafeRawBufferPointer, into output: UnsafeMutableRawBufferPointer) -> Bool {
        unsafe decompress(input, into: output) == output.count
    }

    /// Decompresses `input` until it ends or `output` is full.
    /// - Returns: bytes of output; nil when the input is none of zlib's, or is cut short.
    func decompress(_ input: UnsafeRawBufferPointer, into output: UnsafeMutableRawBufferPointer) -> Int? {
        guard unsafe inflateReset(stream) == Z_OK else { return nil }
        // zlib reads and writes within these bounds; what it has not used of the input is padding up to a sector.
        let source = unsafe UnsafeMutablePointer(mutating: input.baseAddress?.assumingMemoryBound(to: UInt8.self))
        unsafe stream.pointee.next_in = source
        unsafe stream.pointee.avail_in = UInt32(clamping: input.count)
        unsafe stream.pointee.next_out = output.baseAddress?.assumingMemoryBound(to: UInt8.self)
        unsafe stream.pointee.avail_out = UInt32(clamping: output.count)
        let status = unsafe CZlib.inflate(stream, Z_FINISH)
        let left = unsafe Int(stream.pointee.avail_out)
        return status == Z_STREAM_END || (status == Z_BUF_ERROR && left == 0) ? output.count - left : nil
    }
}
