internal import CZlib

/// Raw deflate streams, as qcow2 keeps compressed clusters, decompressed one at a time with one reused state.
@safe struct Inflater: ~Copyable {
    private let stream: UnsafeMutablePointer<z_stream>

    /// Returns nil when there is no memory for zlib's state.
    init?() {
        unsafe stream = .allocate(capacity: 1)
        unsafe stream.initialize(to: z_stream())
        // A negative window means no zlib header; 2^12 bytes is qcow2's window.
        let status = unsafe inflateInit2_(stream, -12, ZLIB_VERSION, Int32(MemoryLayout<z_stream>.size))
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
        guard unsafe inflateReset(stream) == Z_OK else { return false }
        // zlib reads and writes within these bounds; what it has not used of the input is padding up to a sector.
        let source = unsafe UnsafeMutablePointer(mutating: input.baseAddress?.assumingMemoryBound(to: UInt8.self))
        unsafe stream.pointee.next_in = source
        unsafe stream.pointee.avail_in = UInt32(clamping: input.count)
        unsafe stream.pointee.next_out = output.baseAddress?.assumingMemoryBound(to: UInt8.self)
        unsafe stream.pointee.avail_out = UInt32(clamping: output.count)
        let status = unsafe CZlib.inflate(stream, Z_FINISH)
        return unsafe (status == Z_STREAM_END || status == Z_BUF_ERROR) && stream.pointee.avail_out == 0
    }
}
