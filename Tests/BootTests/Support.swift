// SPDX-License-Identifier: Apache-2.0

@testable import Boot
import Glibc
import GuestMemory
import Linux
import Platform
import TestSupport

/// Lets `body` use bytes as a kernel's or initrd's file.
func withFile<Result>(
    _ bytes: [UInt8], name: String = "kernel.elf", _ body: (BootFile) throws -> Result
) rethrows -> Result {
    let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: max(bytes.count, 1), alignment: 16)
    defer { unsafe memory.deallocate() }
    unsafe memory.copyBytes(from: bytes)
    return try body(unsafe BootFile(name: name, memory: UnsafeRawBufferPointer(rebasing: memory[..<bytes.count])))
}

/// What `body` throws as a ``BootError``, or nil.
func bootError(_ body: () throws -> Void) -> BootError? {
    do {
        try body()
        return nil
    } catch {
        return error as? BootError
    }
}

/// An ELF file put together field by field, right or wrong.
struct ELFBuilder {
    struct Segment {
        var type: UInt32 = 1
        var address: UInt64
        var linkedAddress: UInt64?
        var contents: [UInt8]
        var memorySize: UInt64?
        var fileSize: UInt64?
        var alignment: UInt64 = 0
    }

    var is64Bit = true
    var machine: UInt16 = 62
    var type: UInt16 = 2
    var entry: UInt64 = 0x10_0000
    var segments: [Segment] = []
    var programHeaderCount: UInt16?

    static func note(_ owner: String, _ type: UInt32, _ value: [UInt8]) -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.append(littleEndian: UInt32(owner.utf8.count + 1))
        bytes.append(littleEndian: UInt32(value.count))
        bytes.append(littleEndian: type)
        bytes += owner.utf8 + [0]
        bytes += Array(repeating: 0, count: -bytes.count & 3)
        bytes += value
        return bytes + Array(repeating: 0, count: -bytes.count & 3)
    }

    static func word<Value: FixedWidthInteger>(_ value: Value) -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.append(littleEndian: value)
        return bytes
    }

    mutating func addNote(_ owner: String, _ type: UInt32, _ value: [UInt8]) {
        segments.append(Segment(type: 4, address: 0, contents: Self.note(owner, type, value)))
    }

    var bytes: [UInt8] {
        let headerSize = is64Bit ? 64 : 52
        let entrySize = is64Bit ? 56 : 32
        var header: [UInt8] = [0x7f, 0x45, 0x4c, 0x46, is64Bit ? 2 : 1, 1, 1] + Array(repeating: 0, count: 9)
        func append(_ value: UInt64, to bytes: inout [UInt8]) {
            if is64Bit {
                bytes.append(littleEndian: value)
            } else {
                bytes.append(littleEndian: UInt32(truncatingIfNeeded: value))
            }
        }
        header.append(littleEndian: type)
        header.append(littleEndian: machine)
        header.append(littleEndian: UInt32(1))
        append(entry, to: &header)
        append(UInt64(headerSize), to: &header)
        append(0, to: &header)
        header.append(littleEndian: UInt32(0))
        header.append(littleEndian: UInt16(headerSize))
        header.append(littleEndian: UInt16(entrySize))
        header.append(littleEndian: programHeaderCount ?? UInt16(segments.count))
        header += [0, 0, 0, 0, 0, 0]
        var contents: [UInt8] = []
        let contentsOffset = UInt64(headerSize + entrySize * segments.count)
        for segment in segments {
            let offset = contentsOffset + UInt64(contents.count)
            let fileSize = segment.fileSize ?? UInt64(segment.contents.count)
            header.append(littleEndian: segment.type)
            if is64Bit { header.append(littleEndian: UInt32(7)) }
            append(offset, to: &header)
            append(segment.linkedAddress ?? segment.address, to: &header)
            append(segment.address, to: &header)
            append(fileSize, to: &header)
            append(segment.memorySize ?? fileSize, to: &header)
            if !is64Bit { header.append(littleEndian: UInt32(7)) }
            append(segment.alignment, to: &header)
            contents += segment.contents
        }
        return header + contents
    }

    /// A kernel of one segment at 1 MiB.
    static func kernel(_ contents: [UInt8] = Array(repeating: 0x90, count: 256)) -> ELFBuilder {
        ELFBuilder(segments: [Segment(address: 0x10_0000, contents: contents, memorySize: UInt64(contents.count) + 64)])
    }
}

typealias SeededGenerator = TestSupport.SeededGenerator

enum TemporaryFile {
    /// Lets `body` use a file with these contents, and removes it.
    static func with<Result>(_ bytes: [UInt8], suffix: String = "", _ body: (String) throws -> Result) throws -> Result
    {
        let path = "\(P_tmpdir)/swkvm-boot-test-\(UInt64.random(in: 0 ... .max))\(suffix)"
        defer { unsafe unlink(path) }
        try FileDescriptor.open(path, O_CREAT | O_EXCL | O_RDWR, mode: 0o600).writeAll(bytes)
        return try body(path)
    }
}

extension KernelLoader {
    /// A kernel's file with words that are its whole command line.
    init(
        kernel: BootFile, initrd: BootFile? = nil, commandLine: String = "", tables: ACPITables? = nil,
        memorySize: UInt64 = PhysicalLayout.hole.lowerBound
    ) throws(BootError) {
        self = try KernelLoader(
            KernelImage(kernel, memorySize: memorySize), initrd: initrd, commandLine: KernelCommandLine(commandLine),
            tables: tables)
    }
}
