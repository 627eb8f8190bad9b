// SPDX-License-Identifier: Apache-2.0

public import Platform

/// A kernel's file, its headers read and checked: what kind of kernel it is, how it is entered, what its command line
/// may be.
public struct KernelImage: Sendable {
    /// The entry protocol of a kernel (docs/platform.md, "How a kernel is entered").
    public enum Entry: Sendable, Equatable {
        /// A swkvm note: long mode, `RDI` = start information.
        case longMode(UInt64)
        /// A PVH note: 32-bit protected mode, `EBX` = start information.
        case pvh(UInt64)
        /// `e_entry` of an ELF64, by the protocol of Linux's `startup_64`.
        case linux(UInt64)
        /// A bzImage: at 0x200 from wherever it is loaded.
        case bzImage
    }

    enum Format: Sendable {
        case elf(ELFImage)
        case linux(LinuxImage)
    }

    /// The entry protocol and address of the kernel.
    public let entry: Entry
    /// Indicates whether it is Linux, or is entered as only Linux is.
    public let isLinux: Bool
    /// Indicates whether the file itself says that it is Linux: a bzImage, or an ELF file with such a note.
    public let namesLinux: Bool
    /// The longest command line that it reads, in bytes without the closing NUL.
    public let commandLineLimit: Int
    let format: Format
    let file: BootFile

    /// `COMMAND_LINE_SIZE` of Linux on x86 (arch/x86/include/asm/setup.h), less the closing NUL. An ELF file does not
    /// say it, as the header of a bzImage does; what is longer the kernel cuts off.
    static let linuxCommandLineLimit = 2047

    /// Reads and checks the kernel's headers.
    /// - Parameters:
    ///   - given: an ELF file or a bzImage, or one of them compressed with gzip, which is decompressed here.
    ///   - memorySize: bytes of the guest's RAM; a compressed kernel may not decompress to more.
    public init(_ given: BootFile, memorySize: UInt64 = PhysicalLayout.hole.lowerBound) throws(BootError) {
        var file = given
        var start = try file.read(at: 0, count: Int(min(file.size, UInt64(LinuxImage.headerEnd))))
        switch Compression.found(in: start) {
        case .gzip?:
            file = try given.decompressed(limit: min(memorySize, PhysicalLayout.hole.lowerBound))
            start = try file.read(at: 0, count: Int(min(file.size, UInt64(LinuxImage.headerEnd))))
        case let format?:
            throw .compressed(file: file.name, format: "\(format)")
        case nil: break
        }
        self.file = file
        if ELFImage.matches(start) {
            let image = try ELFImage(file)
            format = .elf(image)
            entry = try Self.entry(of: image, file)
            isLinux = if case .linux = entry { true } else { image.isLinux }
            namesLinux = image.isLinux
            commandLineLimit = isLinux ? Self.linuxCommandLineLimit : KernelCommandLine.limit
        } else if LinuxImage.matches(start) {
            let image = try LinuxImage(file)
            format = .linux(image)
            entry = .bzImage
            isLinux = true
            namesLinux = true
            commandLineLimit = min(image.commandLineLimit, KernelCommandLine.limit)
        } else {
            throw .notAKernel(file: file.name)
        }
    }

    /// The path as it was given.
    public var name: String { file.name }

    /// A description of the kernel's format, as in "vmlinuz (a Linux bzImage)".
    public var kind: String {
        switch entry {
        case .bzImage: "a Linux bzImage"
        case .linux: "a 64-bit ELF file, entered as Linux is"
        case .pvh: isLinux ? "a Linux ELF file, entered by PVH" : "an ELF file, entered by PVH"
        case .longMode: "an ELF file, entered in long mode"
        }
    }

    private static func entry(of image: ELFImage, _ file: BootFile) throws(BootError) -> Entry {
        if let address = image.longModeEntry { return .longMode(address) }
        if let address = image.pvhEntry { return .pvh(address) }
        guard image.is64Bit else {
            throw .noEntry(
                file: file.name, reason: "it is a 32-bit ELF without a PVH note; expected the note or a 64-bit ELF")
        }
        guard let address = image.entry else {
            throw .noEntry(file: file.name, reason: "its e_entry lies in none of its segments and it has no PVH note")
        }
        return .linux(address)
    }
}
