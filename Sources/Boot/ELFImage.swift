// SPDX-License-Identifier: Apache-2.0

/// A kernel in ELF: what it loads, where, and how it says it may be entered (docs/platform.md, "How a kernel is
/// entered").
///
/// Everything in the file is untrusted. A value of this type has passed these checks: segments lie within the file, do
/// not overlap in memory, do not wrap, and every entry lies in a segment.
public struct ELFImage: Sendable, Equatable {
    /// A part of the file that goes into memory (`PT_LOAD`).
    public struct Segment: Sendable, Equatable {
        /// The offset of the bytes in the file.
        public let fileOffset: UInt64
        /// The number of bytes in the file.
        public let fileSize: UInt64
        /// The guest-physical address (`p_paddr`).
        public let address: UInt64
        /// Bytes in memory, at least `fileSize`; what the file lacks is zero.
        public let memorySize: UInt64
        /// The address it is linked at (`p_vaddr`).
        let linkedAddress: UInt64

        /// One past its last address.
        public var end: UInt64 { address + memorySize }
    }

    /// The segments in the order of their addresses.
    public let segments: [Segment]
    /// Indicates whether the file is of class ELF64.
    public let is64Bit: Bool
    /// Physical address of `e_entry`, when it lies in a segment.
    public let entry: UInt64?
    /// Physical address of the 32-bit entry that a PVH note names.
    public let pvhEntry: UInt64?
    /// Physical address of the long-mode entry that a swkvm note names.
    public let longModeEntry: UInt64?
    /// Indicates whether its notes identify it as Linux.
    public let isLinux: Bool

    /// Kernels have around ten; a file with more than this is not one.
    static let maximumProgramHeaders = 128
    /// Linux's `.notes` has a few hundred bytes.
    static let maximumNoteSize = 64 << 10

    /// Indicates whether a file begins as ELF files do.
    static func matches(_ start: [UInt8]) -> Bool { start.starts(with: [0x7f, 0x45, 0x4c, 0x46]) }

    /// Reads and checks the headers and notes.
    init(_ file: BootFile) throws(BootError) {
        let header = try Header(file)
        is64Bit = header.is64Bit
        var loads: [Segment] = []
        var notes = Notes()
        for program in try header.programHeaders(of: file) {
            switch program.type {
            case ProgramHeader.load where program.memorySize > 0: loads.append(try program.segment(of: file))
            case ProgramHeader.note: try notes.read(program, of: file)
            default: break
            }
        }
        guard !loads.isEmpty else { throw .noLoadableSegment(file: file.name) }
        loads.sort { $0.address < $1.address }
        for (lower, upper) in zip(loads, loads.dropFirst()) where upper.address < lower.end {
            throw .malformed(
                file: file.name, reason: "its segments at \(hex(lower.address)) and \(hex(upper.address)) overlap")
        }
        segments = loads
        entry = Self.physical(header.entry, in: loads)
        (pvhEntry, longModeEntry, isLinux) = (notes.pvhEntry, notes.longModeEntry, notes.isLinux)
        for (name, address) in [("PVH", pvhEntry), ("swkvm", longModeEntry)] {
            guard let address, !loads.contains(where: { $0.address <= address && address < $0.end }) else { continue }
            throw .malformed(
                file: file.name, reason: "the entry \(hex(address)) of its \(name) note lies in none of its segments")
        }
    }

    /// `e_entry` is physical in a Linux vmlinux and virtual in what a plain linker script makes; either lies in a
    /// segment.
    private static func physical(_ entry: UInt64, in segments: [Segment]) -> UInt64? {
        if segments.contains(where: { $0.address <= entry && entry < $0.end }) { return entry }
        for segment in segments
        where entry >= segment.linkedAddress && entry - segment.linkedAddress < segment.memorySize {
            return segment.address + (entry - segment.linkedAddress)
        }
        return nil
    }
}

/// The fields of the ELF header that matter (System V ABI, "ELF Header").
private struct Header {
    static let i386: UInt16 = 3
    static let x86_64: UInt16 = 62

    let is64Bit: Bool
    let entry: UInt64
    let tableOffset: UInt64
    let tableCount: Int

    init(_ file: BootFile) throws(BootError) {
        let start = try file.read(at: 0, count: Int(min(file.size, 64)))
        guard ELFImage.matches(start) else { throw .notAKernel(file: file.name) }
        guard let machine: UInt16 = start.load(at: 18), let type: UInt16 = start.load(at: 16) else {
            throw .truncated(file: file.name, wanted: 64, found: file.size)
        }
        // The byte order is checked first: a big-endian file's machine reads the other way round.
        if start[5] == 2 { throw .wrongMachine(file: file.name, machine: machine.byteSwapped) }
        guard machine == Header.x86_64 || machine == Header.i386 else {
            throw .wrongMachine(file: file.name, machine: machine)
        }
        guard start[4] == 1 || start[4] == 2, start[5] == 1, start[6] == 1 else {
            throw .malformed(
                file: file.name,
                reason: "class \(start[4]), byte order \(start[5]) and version \(start[6]) in its ELF header")
        }
        // Executables, and position-independent ones: both specify their addresses.
        guard type == 2 || type == 3 else { throw .noLoadableSegment(file: file.name) }
        is64Bit = start[4] == 2
        guard start.count >= (is64Bit ? 64 : 52) else {
            throw .truncated(file: file.name, wanted: is64Bit ? 64 : 52, found: file.size)
        }

        // The reads below lie within the size just checked.
        let entrySize: UInt16
        let count: UInt16
        if is64Bit {
            entry = start.load(at: 24) ?? 0
            tableOffset = start.load(at: 32) ?? 0
            entrySize = start.load(at: 54) ?? 0
            count = start.load(at: 56) ?? 0
        } else {
            entry = UInt64(start.load(UInt32.self, at: 24) ?? 0)
            tableOffset = UInt64(start.load(UInt32.self, at: 28) ?? 0)
            entrySize = start.load(at: 42) ?? 0
            count = start.load(at: 44) ?? 0
        }
        guard count > 0 else { throw .noLoadableSegment(file: file.name) }
        guard entrySize == (is64Bit ? 56 : 32), count <= ELFImage.maximumProgramHeaders else {
            throw .malformed(
                file: file.name,
                reason:
                    "\(count) program headers of \(entrySize) bytes; expected at most \(ELFImage.maximumProgramHeaders) of \(is64Bit ? 56 : 32)"
            )
        }
        tableCount = Int(count)
    }

    func programHeaders(of file: BootFile) throws(BootError) -> [ProgramHeader] {
        let size = is64Bit ? 56 : 32
        let table = try file.read(at: tableOffset, count: tableCount * size)
        return (0..<tableCount).map { ProgramHeader(table, at: $0 * size, is64Bit: is64Bit) }
    }
}

/// One program header (System V ABI, "Program Header").
private struct ProgramHeader {
    static let load: UInt32 = 1
    static let note: UInt32 = 4

    let type: UInt32
    let offset: UInt64
    let linkedAddress: UInt64
    let address: UInt64
    let fileSize: UInt64
    let memorySize: UInt64
    let alignment: UInt64

    /// Reads an entry of a table that was read whole.
    init(_ table: [UInt8], at base: Int, is64Bit: Bool) {
        func field(_ wide: Int, _ narrow: Int) -> UInt64 {
            is64Bit ? table.load(at: base + wide) ?? 0 : UInt64(table.load(UInt32.self, at: base + narrow) ?? 0)
        }
        type = table.load(at: base) ?? 0
        offset = field(8, 4)
        linkedAddress = field(16, 8)
        address = field(24, 12)
        fileSize = field(32, 16)
        memorySize = field(40, 20)
        alignment = field(48, 28)
    }

    func segment(of file: BootFile) throws(BootError) -> ELFImage.Segment {
        guard fileSize <= memorySize else {
            throw .malformed(
                file: file.name,
                reason:
                    "the segment at \(hex(address)) has \(fileSize) bytes in the file and only \(memorySize) in memory")
        }
        guard address.adding(memorySize) != nil else {
            throw .malformed(
                file: file.name, reason: "the segment at \(hex(address)) of \(hex(memorySize)) bytes wraps around 2^64")
        }
        let end = offset.adding(fileSize) ?? .max
        guard end <= file.size else { throw .truncated(file: file.name, wanted: end, found: file.size) }
        return ELFImage.Segment(
            fileOffset: offset, fileSize: fileSize, address: address, memorySize: memorySize,
            linkedAddress: linkedAddress)
    }
}

/// The entries that notes name (System V ABI, "Note Section").
private struct Notes {
    /// `XEN_ELFNOTE_PHYS32_ENTRY` of Xen's public `elfnote.h`.
    static let pvhType: UInt32 = 18
    /// `XEN_ELFNOTE_GUEST_OS`.
    static let guestType: UInt32 = 6
    static let longModeType: UInt32 = 1

    var pvhEntry: UInt64?
    var longModeEntry: UInt64?
    var isLinux = false

    mutating func read(_ program: ProgramHeader, of file: BootFile) throws(BootError) {
        guard program.fileSize <= ELFImage.maximumNoteSize else {
            throw .malformed(
                file: file.name,
                reason: "\(program.fileSize) bytes of notes; expected at most \(ELFImage.maximumNoteSize)")
        }
        let bytes = try file.read(at: program.offset, count: Int(program.fileSize))
        // Names and descriptors are padded to 4 bytes, in segments aligned to 8 to 8.
        let alignment: UInt64 = program.alignment == 8 ? 8 : 4
        var position: UInt64 = 0
        while let nameSize: UInt32 = bytes.load(at: Int(position)),
            let size: UInt32 = bytes.load(at: Int(position) + 4),
            let type: UInt32 = bytes.load(at: Int(position) + 8)
        {
            // 32-bit sizes on a position below 64 KiB: these sums stay far from 2^64.
            let name = position + 12
            let descriptor = (name + UInt64(nameSize) + alignment - 1).alignedDown(to: alignment)
            let end = descriptor + UInt64(size)
            guard end <= UInt64(bytes.count) else {
                throw .malformed(
                    file: file.name, reason: "a note of \(size) bytes reaches past its segment of \(bytes.count)")
            }
            let owner = bytes[Int(name)..<Int(name) + Int(nameSize)]
            try take(owner: owner, type: type, Array(bytes[Int(descriptor)..<Int(end)]), file)
            position = (end + alignment - 1).alignedDown(to: alignment)
        }
    }

    private mutating func take(
        owner: ArraySlice<UInt8>, type: UInt32, _ value: [UInt8], _ file: BootFile
    ) throws(BootError) {
        if owner.elementsEqual("Xen\0".utf8), type == Notes.pvhType {
            // Four bytes in theory; Linux for x86-64 writes eight.
            let address =
                value.count == 8 ? value.load(UInt64.self, at: 0) : value.load(UInt32.self, at: 0).map(UInt64.init)
            guard let address, address <= UInt32.max else {
                throw .malformed(
                    file: file.name, reason: "its PVH note of \(value.count) bytes holds no 32-bit address")
            }
            pvhEntry = address
        } else if owner.elementsEqual("Xen\0".utf8), type == Notes.guestType {
            if value.elementsEqual("linux\0".utf8) { isLinux = true }
        } else if owner.elementsEqual("Linux\0".utf8) {
            // Its build salt (include/linux/build-salt.h, since 4.19), and others since: every kernel with a PVH note
            // has one.
            isLinux = true
        } else if owner.elementsEqual("swkvm\0".utf8), type == Notes.longModeType {
            guard value.count == 8, let address: UInt64 = value.load(at: 0) else {
                throw .malformed(
                    file: file.name, reason: "its swkvm note has \(value.count) bytes; expected an 8-byte address")
            }
            longModeEntry = address
        }
    }
}
