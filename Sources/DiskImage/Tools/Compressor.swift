// SPDX-License-Identifier: Apache-2.0

internal import CZlib
internal import CZstd
internal import Glibc
internal import Linux

/// Compresses clusters, one at a time with one reused state, as ``Inflater`` reads them: for qcow2 raw deflate streams
/// with a window of 2^12 bytes, for VMDK zlib's format with its usual window.
struct Deflater: ~Copyable {
    private let state: ZlibState
    /// nil where everything has to be compressed, whether that makes it smaller or not.
    private let compressibility: Compressibility?

    /// - Parameters:
    ///   - level: zlib's, 1 to 9.
    ///   - isGrain: whether zlib's format is wanted, of all that comes.
    /// Returns nil when there is no memory for zlib's state.
    init?(level: Int32, isGrain: Bool = false) {
        let windowBits: Int32 = isGrain ? 15 : -12
        compressibility = isGrain ? nil : Compressibility()
        // zlib gets its own state.
        let state = unsafe ZlibState(end: { unsafe deflateEnd($0) }) {
            unsafe deflateInit2_(
                $0, level, Z_DEFLATED, windowBits, 9, Z_DEFAULT_STRATEGY, ZLIB_VERSION,
                Int32(MemoryLayout<z_stream>.size))
        }
        guard let state else { return nil }
        self.state = state
    }

    /// - Returns: bytes of the compressed form, or nil when it does not fit into `output`, or, for qcow2, would hardly
    ///   be smaller than `input`.
    func deflate(_ input: IOMemory, into output: IOMemory) -> Int? {
        guard compressibility?.isLikely(input) ?? true else { return nil }
        // As above.
        let result = unsafe state.run(
            input, into: output, reset: { unsafe deflateReset($0) }, { unsafe CZlib.deflate($0, Z_FINISH) })
        guard let (status, count) = result, status == Z_STREAM_END else { return nil }
        return count
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
        // This is the only owner.
        _ = unsafe ZSTD_freeCCtx(context)
    }

    /// - Returns: bytes of the compressed form, or nil when it does not fit into `output`.
    func compress(_ input: IOMemory, into output: IOMemory) -> Int? {
        // libzstd reads and writes within these bounds.
        let size = unsafe ZSTD_compress2(context, output.start, output.count, input.start, input.count)
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
            guard let deflater = Deflater(level: Int32(level ?? 6)) else {
                throw .system(path: path, SystemCallError("deflateInit", errno: ENOMEM))
            }
            self = .zlib(deflater)
        case .zstd:
            guard let compressor = ZstdCompressor(level: Int32(level ?? 3)) else {
                throw .system(path: path, SystemCallError("ZSTD_createCCtx", errno: ENOMEM))
            }
            self = .zstd(compressor)
        }
    }

    /// For VMDK's grains.
    init(grainsWithLevel level: Int?, _ path: String) throws(DiskImageError) {
        guard let deflater = Deflater(level: Int32(level ?? 4), isGrain: true) else {
            throw .system(path: path, SystemCallError("deflateInit", errno: ENOMEM))
        }
        self = .zlib(deflater)
    }

    /// - Returns: bytes of the compressed form, or nil when it does not fit into `output`.
    func compress(_ input: IOMemory, into output: IOMemory) -> Int? {
        switch self {
        case .zlib(let deflater): deflater.deflate(input, into: output)
        case .zstd(let compressor): compressor.compress(input, into: output)
        }
    }
}
