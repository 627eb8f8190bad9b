// SPDX-License-Identifier: Apache-2.0

internal import CZstd

/// What undoes the compression of an image's clusters, one at a time with one reused state.
enum Decompressor: ~Copyable {
    case zlib(Inflater)
    case zstd(ZstdDecompressor)

    /// Returns nil when there is no memory for the state.
    init?(_ compression: QCOW2Header.Compression) {
        switch compression {
        case .zlib:
            guard let inflater = Inflater() else { return nil }
            self = .zlib(inflater)
        case .zstd:
            guard let decompressor = ZstdDecompressor() else { return nil }
            self = .zstd(decompressor)
        }
    }

    /// Decompresses `input` until `output` is full, and not a byte further.
    /// - Returns: whether it could be filled.
    func decompress(_ input: IOMemory, into output: IOMemory) -> Bool {
        switch self {
        case .zlib(let inflater): inflater.inflate(input, into: output)
        case .zstd(let decompressor): decompressor.decompress(input, into: output)
        }
    }
}

/// Zstandard frames.
@safe struct ZstdDecompressor: ~Copyable {
    private let context: OpaquePointer

    /// The largest window that is taken: what a cluster of 2 MiB can need, so that a hostile frame gets no more memory.
    private static let maximumWindowLog: Int32 = 21

    init?() {
        // Alone with this value until `deinit`.
        guard let context = unsafe ZSTD_createDCtx() else { return nil }
        unsafe self.context = context
        // A parameter within its bounds, so it is taken.
        _ = unsafe ZSTD_DCtx_setParameter(context, ZSTD_d_windowLogMax, Self.maximumWindowLog)
    }

    deinit {
        // This is the only owner.
        _ = unsafe ZSTD_freeDCtx(context)
    }

    func decompress(_ input: IOMemory, into output: IOMemory) -> Bool {
        // The context is this value's.
        _ = unsafe ZSTD_DCtx_reset(context, ZSTD_reset_session_only)
        // libzstd reads and writes within these bounds; what it has not used of the input is padding up to a sector.
        var source = unsafe ZSTD_inBuffer(src: input.start, size: input.count, pos: 0)
        var target = unsafe ZSTD_outBuffer(dst: output.start, size: output.count, pos: 0)
        while unsafe target.pos < target.size {
            let before = unsafe (source.pos, target.pos)
            let status = unsafe ZSTD_decompressStream(context, &target, &source)
            guard ZSTD_isError(status) == 0 else { return false }
            // A frame that has ended, or an input that has, gives no more.
            guard status != 0, unsafe (source.pos, target.pos) != before else { break }
        }
        return unsafe target.pos == target.size
    }
}
