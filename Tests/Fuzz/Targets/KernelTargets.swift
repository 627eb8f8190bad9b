// SPDX-License-Identifier: Apache-2.0

import Boot
import CZlib
import GuestMemory
import TestSupport

extension FuzzTarget {
    /// A kernel: ELF headers, program headers and notes, or the setup header of a bzImage.
    static let kernel = FuzzTarget(name: "kernel", seeds: kernels) { bytes in boots(bytes) }

    /// A kernel that is compressed: an input whose first byte is even is compressed here, so that its checksum is
    /// right; another is taken for what a gzip file contains.
    static let compressedKernel = FuzzTarget(
        name: "compressed-kernel", seeds: kernels.map { [0] + $0 } + kernels.map { [1] + gzip($0) }
    ) { bytes in
        guard let kind = bytes.first else { return false }
        let rest = Array(bytes.dropFirst())
        return boots(kind % 2 == 0 ? gzip(rest) : rest)
    }

    private static let ramSize: UInt64 = 32 << 20

    /// Loads a kernel as a machine does, and checks what may be relied on then.
    private static func boots(_ bytes: [UInt8]) -> Bool {
        guard let memory = try? GuestMemory(size: ramSize) else { fatalError("no memory for a guest") }
        let initrd = [UInt8](repeating: 0xa5, count: 5000)
        return bytes.withUnsafeBytes { kernel in
            initrd.withUnsafeBytes { contents in
                let file = BootFile(name: "kernel", memory: kernel), disk = BootFile(name: "initrd", memory: contents)
                guard
                    let loader = try? KernelLoader(
                        KernelImage(file, memorySize: ramSize), initrd: disk,
                        commandLine: KernelCommandLine("console=ttyS0")),
                    let state = try? loader.load(into: memory, isFresh: false)
                else { return false }
                precondition(
                    state.rip >= 0x1_0000 && state.rip < ramSize, "the entry \(state.rip) is not in RAM for a kernel")
                // The first module of hvm_start_info, which is at 0x600.
                guard let list = try? memory.ram.readUInt64(at: GuestAddress(0x610)),
                    let place = try? memory.ram.readUInt64(at: GuestAddress(list))
                else { fatalError("no module list") }
                precondition(
                    (try? memory.ram.readBytes(at: GuestAddress(place), count: initrd.count)) == initrd,
                    "the initrd is overwritten")
                return true
            }
        }
    }

    private static let kernels = [
        bzImage(), elf64(note: ("Xen", 18, 4)), elf64(note: ("swkvm", 1, 8)), elf64(note: nil), elf32(),
    ]

    /// Boot protocol 2.15, one page of code.
    private static func bzImage() -> [UInt8] {
        var file = [UInt8](repeating: 0, count: 5 * 512 + 4096)
        put(&file, 0x1f1, 4, 1)
        put(&file, 0x1f4, 4096 / 16, 4)
        put(&file, 0x1fe, 0xaa55, 2)
        put(&file, 0x200, 0x6aeb, 2)
        put(&file, 0x202, 0x5372_6448, 4)
        put(&file, 0x206, 0x020f, 2)
        put(&file, 0x211, 1, 1)
        put(&file, 0x22c, 0x7fff_ffff, 4)
        put(&file, 0x230, 0x20_0000, 4)
        put(&file, 0x234, 1, 1)
        put(&file, 0x236, 0x3f, 2)
        put(&file, 0x238, 2047, 4)
        put(&file, 0x258, 0x100_0000, 8)
        put(&file, 0x260, 0x40_0000, 4)
        return file
    }

    /// Two segments, and a note if there is to be one.
    private static func elf64(note: (owner: String, type: UInt64, width: Int)?) -> [UInt8] {
        var file = [UInt8](repeating: 0, count: 0x400)
        header(&file, class: 2, machine: 62)
        put(&file, 24, 0x10_0000, 8)
        put(&file, 32, 64, 8)
        put(&file, 54, 56, 2)
        put(&file, 56, note == nil ? 2 : 3, 2)
        for (index, address) in [0x10_0000, 0x20_0000].enumerated() as EnumeratedSequence<[UInt64]> {
            let base = 64 + 56 * index
            put(&file, base, 1, 4)
            put(&file, base + 8, 0x200 + UInt64(index) * 0x80, 8)
            put(&file, base + 16, 0xffff_ffff_8000_0000 + address, 8)
            put(&file, base + 24, address, 8)
            put(&file, base + 32, 0x80, 8)
            put(&file, base + 40, 0x1000, 8)
        }
        guard let note else { return file }
        put(&file, 64 + 112, 4, 4)
        put(&file, 64 + 120, 0x300, 8)
        putNote(&file, at: 0x300, note.owner, note.type, width: note.width, sizeAt: 64 + 112 + 32)
        return file
    }

    /// One segment and a PVH note.
    private static func elf32() -> [UInt8] {
        var file = [UInt8](repeating: 0, count: 0x400)
        header(&file, class: 1, machine: 3)
        put(&file, 28, 52, 4)
        put(&file, 42, 32, 2)
        put(&file, 44, 2, 2)
        put(&file, 52, 1, 4)
        put(&file, 56, 0x200, 4)
        put(&file, 60, 0x10_0000, 4)
        put(&file, 64, 0x10_0000, 4)
        put(&file, 68, 0x100, 4)
        put(&file, 72, 0x1000, 4)
        put(&file, 84, 4, 4)
        put(&file, 88, 0x300, 4)
        putNote(&file, at: 0x300, "Xen", 18, width: 4, sizeAt: 84 + 16)
        return file
    }

    private static func header(_ file: inout [UInt8], class bits: UInt64, machine: UInt64) {
        put(&file, 0, 0x464c_457f, 4)
        put(&file, 4, 0x01_0100 | bits, 3)
        put(&file, 16, 2, 2)
        put(&file, 18, machine, 2)
    }

    /// A note whose value is the address of the first segment; the note's size goes to the program header's field at
    /// `sizeAt`.
    private static func putNote(
        _ file: inout [UInt8], at place: Int, _ owner: String, _ type: UInt64, width: Int, sizeAt: Int
    ) {
        let name = Array(owner.utf8) + [0]
        put(&file, place, UInt64(name.count), 4)
        put(&file, place + 4, UInt64(width), 4)
        put(&file, place + 8, type, 4)
        file.replaceSubrange(place + 12..<place + 12 + name.count, with: name)
        let value = place + 12 + (name.count + 3) / 4 * 4
        put(&file, value, 0x10_0000, width)
        put(&file, sizeAt, UInt64(value + width - place), 4)
    }
}

/// The bytes as a gzip file.
public func gzip(_ bytes: [UInt8]) -> [UInt8] { deflated(bytes, windowBits: 15 + 16) }

/// Compresses bytes.
/// - Parameter windowBits: as zlib has it: log2 of how far back it looks, negative for nothing but the compressed
///   bytes, with 16 more for a gzip file.
func deflated(_ bytes: [UInt8], windowBits: Int32) -> [UInt8] {
    var stream = z_stream()
    guard
        deflateInit2_(
            &stream, 1, Z_DEFLATED, windowBits, 8, Z_DEFAULT_STRATEGY, ZLIB_VERSION, Int32(MemoryLayout<z_stream>.size))
            == Z_OK
    else {
        fatalError("no memory for zlib")
    }
    defer { deflateEnd(&stream) }
    var output = [UInt8](repeating: 0, count: Int(deflateBound(&stream, UInt(bytes.count))))
    var input = bytes
    let count = input.withUnsafeMutableBufferPointer { source in
        output.withUnsafeMutableBufferPointer { target in
            (stream.next_in, stream.avail_in) = (source.baseAddress, UInt32(source.count))
            (stream.next_out, stream.avail_out) = (target.baseAddress, UInt32(target.count))
            precondition(deflate(&stream, Z_FINISH) == Z_STREAM_END)
            return Int(stream.total_out)
        }
    }
    return Array(output[..<count])
}
