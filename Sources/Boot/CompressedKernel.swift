// SPDX-License-Identifier: Apache-2.0

internal import CZlib
internal import Glibc
internal import Linux

/// How a whole kernel file may be compressed, by its first bytes. (A bzImage decompresses itself and is none of these.)
enum Compression: CaseIterable {
    case gzip, bzip2, lz4, lzma, xz, zstd

    /// RFC 1952 §2.3.1, and the other formats' own.
    var magic: [UInt8] {
        switch self {
        case .gzip: [0x1f, 0x8b, 8]
        case .bzip2: Array("BZh".utf8)
        case .lz4: [0x04, 0x22, 0x4d, 0x18]
        case .lzma: [0x5d, 0, 0]
        case .xz: [0xfd, 0x37, 0x7a, 0x58, 0x5a, 0]
        case .zstd: [0x28, 0xb5, 0x2f, 0xfd]
        }
    }

    static func found(in start: [UInt8]) -> Compression? { allCases.first { start.starts(with: $0.magic) } }
}

extension BootFile {
    /// The contents of a gzip file (RFC 1952), in memory that goes with the result.
    ///
    /// The file is untrusted. It says in its last four bytes how much it decompresses to; that is checked against
    /// `limit` before memory is taken, and not a byte more is written. Memory is used as it is written, so a file that
    /// promises more than it has costs nothing.
    /// - Parameter limit: the most that it may decompress to, in bytes; below 4 GiB, beyond which the file does not say
    ///   its size.
    func decompressed(limit: UInt64) throws(BootError) -> BootFile {
        // The shortest header and trailer.
        guard size >= 18 else { throw .truncated(file: name, wanted: 18, found: size) }
        let limit = min(limit, UInt64(UInt32.max))
        let promised = UInt64(try read(at: size - 4, count: 4).load(UInt32.self, at: 0) ?? 0)
        guard promised <= limit else { throw .decompressedTooLarge(file: name, size: promised, limit: limit) }
        guard promised > 0 else { throw .malformed(file: name, reason: "it decompresses to nothing") }
        let mapping: Mapping
        do throws(SystemCallError) {
            mapping = try Mapping(size: Int(promised), flags: MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
        } catch {
            throw .unreadable(file: name, error)
        }
        // Within the mapping, whose size may be rounded up to pages.
        try unsafe inflate(into: UnsafeMutableRawBufferPointer(start: mapping.start, count: Int(promised)))
        return BootFile(name: name, mapping: mapping, size: promised)
    }

    /// Decompresses the file and checks that it is one gzip member that fills `output`.
    private func inflate(into output: UnsafeMutableRawBufferPointer) throws(BootError) {
        let input = UnsafeMutableRawBufferPointer.allocate(byteCount: 256 << 10, alignment: 16)
        defer { unsafe input.deallocate() }
        var stream = unsafe z_stream()
        // 15 bits of window, and 16 more for the gzip header and trailer, whose checksum zlib compares.
        guard unsafe inflateInit2_(&stream, 15 + 16, ZLIB_VERSION, Int32(MemoryLayout<z_stream>.size)) == Z_OK else {
            throw .unreadable(file: name, SystemCallError("inflateInit2", errno: ENOMEM))
        }
        defer { unsafe _ = inflateEnd(&stream) }
        unsafe stream.next_out = output.baseAddress?.assumingMemoryBound(to: UInt8.self)
        unsafe stream.avail_out = UInt32(clamping: output.count)
        var position: UInt64 = 0
        while position < size {
            let count = Int(min(size - position, UInt64(input.count)))
            try unsafe read(at: position, into: UnsafeMutableRawBufferPointer(rebasing: input[..<count]))
            // zlib stays within these `count` bytes and what is left of `output`.
            unsafe stream.next_in = input.baseAddress?.assumingMemoryBound(to: UInt8.self)
            unsafe stream.avail_in = UInt32(count)
            let status = unsafe CZlib.inflate(&stream, Z_NO_FLUSH)
            position += UInt64(count)
            switch status {
            case Z_OK where unsafe stream.avail_in == 0:
                continue
            case Z_STREAM_END where unsafe stream.avail_out == 0 && stream.avail_in == 0 && position == size:
                return
            case Z_STREAM_END:
                throw malformed("its gzip data ends before its declared size, or other data follows it")
            case Z_OK, Z_BUF_ERROR:
                throw malformed("it decompresses to more than the \(output.count) bytes that it declares")
            case Z_MEM_ERROR:
                throw .unreadable(file: name, SystemCallError("inflate", errno: ENOMEM))
            default:
                // A constant of zlib's.
                throw malformed(
                    "its gzip data is damaged: "
                        + (unsafe stream.msg.map { unsafe String(cString: $0) } ?? "status \(status)"))
            }
        }
        throw malformed("its gzip data is truncated")
    }

    private func malformed(_ reason: String) -> BootError { .malformed(file: name, reason: reason) }
}
