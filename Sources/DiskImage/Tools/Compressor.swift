// SPDX-License-Identifier: Apache-2.0

internal import CZlib
internal import CZstd
internal import Glibc
internal import Linux

/// Compresses clusters, one at a time with one reused state, as ``Inflater`` reads them: for qcow2 raw deflate streams with a window of 2^12 bytes,
/// for VMDK zlib's format with its usual window.
@safe struct Deflater: ~Copyable {
    private let stream: UnsafeMutablePointer<z_stream>
    /// nil where everything has to be compressed, whether that makes it smaller or not.
    private let compressibility: Compressibility?

    /// - Parameters:
    ///   - level: zlib's, 1 to 9.
    ///   - isGrain: whether zlib's format is wanted, of all that comes.
    /// Returns nil when there is no memory for zlib's state.
    init?(level: Int32, isGrain: Bool = false) {
        let windowBits: Int32 = isGrain ? 15 : -12
        compressibility = isGrain ? nil : Compressibility()
        unsafe stream = .allocate(capacity: 1)
        unsafe stream.initialize(to: z_stream())
        let status = unsafe deflateInit2_(stream, level, Z_DEFLATED, windowBits, 9, Z_DEFAULT_STRATEGY, ZLIB_VERSION, Int32(MemoryLayout<z_stream>.size))
        guard status == Z_OK else {
            unsafe stream.deallocate()
            return nil
        }
    }

    deinit {
        unsafe deflateEnd(stream)
        unsafe stream.deallocate()
    }

    /// - Returns: bytes of the compressed form, or nil when it does not fit into `output`, or, for qcow2, would hardly be smaller than `input`.
    func deflate(_ input: UnsafeRawBufferPointer, into output: UnsafeMutableRawBufferPointer) -> Int? {
        guard unsafe compressibility?.isLikely(input) ?? true, unsafe deflateReset(stream) == Z_OK else { return nil }
        // zlib reads and writes within these bounds.
        unsafe stream.pointee.next_in = UnsafeMutablePointer(mutating: input.baseAddress?.assumingMemoryBound(to: UInt8.self))
        unsafe stream.pointee.avail_in = UInt32(clamping: input.count)
        unsafe stream.pointee.next_out = output.baseAddress?.assumingMemoryBound(to: UInt8.self)
        unsafe stream.pointee.avail_out = UInt32(clamping: output.count)
        guard unsafe CZlib.deflate(stream, Z_FINISH) == Z_STREAM_END else { return nil }
        return unsafe output.count - Int(stream.pointee.avail_out)
    }
}

/// Compresses clusters as Zstandard frames.
@safe struct ZstdCompressor: ~Copyable {
    private let context: OpaquePointer

    /// - Parameter level: libzstd's, 1 to 19.
    /// Returns nil when there is no memory for the state.
    init?(level: Int32) {
        guard let context = unsafe ZSTD_createCCtx() else { return nil }
        unsafe self.context = context
        // A level within its bounds, so it is taken.
        _ = unsafe ZSTD_CCtx_setParameter(context, ZSTD_c_compressionLevel, level)
    }

    deinit {
        _ = unsafe ZSTD_freeCCtx(context)
    }

    /// - Returns: bytes of the compressed form, or nil when it does not fit into `output`.
    func compress(_ input: UnsafeRawBufferPointer, into output: UnsafeMutableRawBufferPointer) -> Int? {
        // libzstd reads and writes within these bounds.
        let size = unsafe ZSTD_compress2(context, output.baseAddress, output.count, input.baseAddress, input.count)
        return ZSTD_isError(size) == 0 ? size : nil
    }
}

/// Compresses clusters in one of qcow2's ways.
enum Compressor: ~Copyable {
    case zlib(Deflater)
    case zstd(ZstdCompressor)

    /// - Parameter level: nil for the library's own usual one, as qemu-img's.
    init(_ type: CompressionType, level: Int?, _ path: String) throws(DiskImageError) {
        switch type {
        case .zlib:
            guard let deflater = Deflater(level: Int32(level ?? 6)) else { throw .system(path: path, SystemCallError("deflateInit", errno: ENOMEM)) }
            self = .zlib(deflater)
        case .zstd:
            guard let compressor = ZstdCompressor(level: Int32(level ?? 3)) else { throw .system(path: path, SystemCallError("ZSTD_createCCtx", errno: ENOMEM)) }
            self = .zstd(compressor)
        }
    }

    /// For VMDK's grains.
    init(grainsWithLevel level: Int?, _ path: String) throws(DiskImageError) {
        guard let deflater = Deflater(level: Int32(level ?? 4), isGrain: true) else { throw .system(path: path, SystemCallError("deflateInit", errno: ENOMEM)) }
        self = .zlib(deflater)
    }

    /// - Returns: bytes of the compressed form, or nil when it does not fit into `output`.
    func compress(_ input: UnsafeRawBufferPointer, into output: UnsafeMutableRawBufferPointer) -> Int? {
        // As the caller says of both.
        switch self {
        case .zlib(let deflater): unsafe deflater.deflate(input, into: output)
        case .zstd(let compressor): unsafe compressor.compress(input, into: output)
        }
    }
}
