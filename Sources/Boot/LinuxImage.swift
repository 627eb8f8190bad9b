// SPDX-License-Identifier: Apache-2.0

internal import Platform

/// A Linux bzImage that offers the 64-bit boot protocol (Linux's `Documentation/arch/x86/boot.rst`).
///
/// Everything in the file is untrusted; a value of this type has been checked for what the protocol demands.
public struct LinuxImage: Sendable, Equatable {
    /// Version of the boot protocol, major in the high byte.
    public let version: UInt16
    /// Where the part that runs in protected mode begins in the file, and its size.
    let payloadOffset: UInt64
    let payloadSize: UInt64
    /// Where it wants to be (`pref_address`), and whether it may be elsewhere.
    let preferredAddress: UInt64
    let isRelocatable: Bool
    /// For another place (`kernel_alignment`): a power of two.
    let alignment: UInt64
    /// Linear memory it needs from its load address on before it looks at the memory map.
    let initialSize: UInt64
    /// The longest command line, without the closing NUL.
    let commandLineLimit: Int
    /// The highest address that an initrd may occupy.
    let initrdLimit: UInt64
    /// The setup header as in the file, for the copy in `boot_params`.
    let setupHeader: [UInt8]

    /// Offset of the setup header in file and in `boot_params`.
    static let headerOffset = 0x1f1
    /// The header may grow up to here (`boot_params` keeps the room free).
    static let headerEnd = 0x290
    /// `startup_64` lies this far into the payload.
    static let entryOffset: UInt64 = 0x200
    /// The first version with `xloadflags`.
    static let minimumVersion: UInt16 = 0x020c

    /// Indicates whether a file begins as a bzImage does.
    static func matches(_ start: [UInt8]) -> Bool {
        start.load(at: 0x1fe) == UInt16(0xaa55) && start.load(at: 0x202) == UInt32(0x5372_6448)
    }

    init(_ file: BootFile) throws(BootError) {
        let start = try file.read(at: 0, count: Int(min(file.size, UInt64(Self.headerEnd))))
        guard Self.matches(start) else { throw .notAKernel(file: file.name) }
        func field<Value: FixedWidthInteger>(_ offset: Int, _: Value.Type) throws(BootError) -> Value {
            guard let value: Value = start.load(at: offset) else {
                throw .truncated(file: file.name, wanted: UInt64(Self.headerEnd), found: file.size)
            }
            return value
        }
        func malformed(_ reason: String) -> BootError { .malformed(file: file.name, reason: reason) }

        version = try field(0x206, UInt16.self)
        guard version >= Self.minimumVersion else {
            throw .noEntry(
                file: file.name,
                reason:
                    "it uses boot protocol \(version >> 8).\(version & 0xff); expected 2.12 or later (Linux 3.8 and later)"
            )
        }
        guard try field(0x236, UInt16.self) & 1 != 0 else {
            throw .noEntry(
                file: file.name, reason: "it has no 64-bit entry (a 32-bit kernel); expected a kernel for x86-64")
        }
        guard try field(0x211, UInt8.self) & 1 != 0 else {
            throw malformed("it is not loaded at 1 MiB or above (loadflags)")
        }

        // The jump instruction at 0x200 skips the header and so shows its end.
        let end = min(0x202 + Int(try field(0x201, UInt8.self)), Self.headerEnd)
        guard end >= 0x264 else { throw malformed("its setup header ends at \(hex(UInt64(end))), before init_size") }
        guard end <= start.count else { throw .truncated(file: file.name, wanted: UInt64(end), found: file.size) }
        setupHeader = Array(start[Self.headerOffset..<end])

        // 0 stands for 4, from a time when it was not filled in.
        let setupSectors = try field(Self.headerOffset, UInt8.self)
        payloadOffset = (UInt64(setupSectors == 0 ? 4 : setupSectors) + 1) * 512
        guard payloadOffset + Self.entryOffset < file.size else {
            throw .truncated(file: file.name, wanted: payloadOffset + Self.entryOffset + 1, found: file.size)
        }
        // syssize counts 16-byte units; what follows them in the file (a signature) is not loaded.
        let systemSize = UInt64(try field(0x1f4, UInt32.self)) * 16
        guard systemSize > Self.entryOffset else {
            throw malformed("its syssize of \(systemSize) bytes ends before its 64-bit entry")
        }
        // The build pads the last unit, or not.
        guard payloadOffset + systemSize <= file.size + 15 else {
            throw .truncated(file: file.name, wanted: payloadOffset + systemSize, found: file.size)
        }
        payloadSize = min(systemSize, file.size - payloadOffset)

        preferredAddress = try field(0x258, UInt64.self)
        isRelocatable = try field(0x234, UInt8.self) != 0
        alignment = UInt64(try field(0x230, UInt32.self))
        guard alignment.nonzeroBitCount == 1, alignment >= 4096 else {
            throw malformed("its kernel_alignment of \(hex(alignment)) is not a power of two of at least 4 KiB")
        }
        initialSize = max(UInt64(try field(0x260, UInt32.self)), payloadSize)
        commandLineLimit = Int(try field(0x238, UInt32.self))
        initrdLimit = UInt64(try field(0x22c, UInt32.self))
    }

    /// Where to load it into RAM that ends at `limit`: where it prefers to be. A lower place gains nothing, since a
    /// relocatable kernel that finds itself below its preferred address moves there (`pref_address`), whether there is
    /// RAM or not.
    func loadAddress(limit: UInt64, file: String) throws(BootError) -> UInt64 {
        let lowest = PhysicalLayout.highRAM.alignedUp(to: alignment) ?? .max
        let start = isRelocatable ? max(preferredAddress, lowest) : preferredAddress
        let end = start.adding(initialSize) ?? .max
        if start < PhysicalLayout.highRAM { throw .reservedMemory(file: file, start: start, end: end) }
        guard end <= limit else { throw .doesNotFit(file: file, start: start, end: end, limit: limit) }
        return start
    }
}
