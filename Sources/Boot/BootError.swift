// SPDX-License-Identifier: Apache-2.0

public import GuestMemory
public import Linux

/// The reason why a machine cannot boot the given kernel.
public enum BootError: Error, Equatable, CustomStringConvertible {
    /// The file cannot be opened or read.
    case unreadable(file: String, SystemCallError)
    /// A device, a pipe or a socket.
    case notRegular(file: String)
    /// A file in a disk image could not be read, for the reason that is given.
    case unreadableContents(file: String, reason: String)
    /// The file ends before data that its own header refers to.
    case truncated(file: String, wanted: UInt64, found: UInt64)
    /// A file that is neither an ELF file nor a Linux bzImage.
    case notAKernel(file: String)
    /// A file that is compressed as a whole, in a format that is not supported.
    case compressed(file: String, format: String)
    /// A compressed kernel whose decompressed size exceeds the limit; both in bytes.
    case decompressedTooLarge(file: String, size: UInt64, limit: UInt64)
    /// An ELF file for another processor; `machine` is its `e_machine`.
    case wrongMachine(file: String, machine: UInt16)
    /// A header whose fields contradict each other or the format's rules.
    case malformed(file: String, reason: String)
    /// An ELF file without a loadable segment.
    case noLoadableSegment(file: String)
    /// A kernel without a supported entry point.
    case noEntry(file: String, reason: String)
    /// A kernel that needs `start ..< end`, where RAM for a kernel ends at `limit`.
    case doesNotFit(file: String, start: UInt64, end: UInt64, limit: UInt64)
    /// A kernel that needs memory reserved by the platform.
    case reservedMemory(file: String, start: UInt64, end: UInt64)
    /// An initrd that does not fit between the kernel and `limit`.
    case initrdDoesNotFit(file: String, size: UInt64, free: UInt64, limit: UInt64)
    /// A command line that exceeds the kernel's limit; all counts in bytes without the closing NUL, `added` those that
    /// are not the
    /// user's.
    case commandLineTooLong(kernel: String, length: Int, added: Int, limit: Int)
    /// A NUL byte in the command line, which would truncate it.
    case commandLineHasNUL
    /// ACPI tables that exceed their space below 1 MiB.
    case tablesTooLarge(size: Int, limit: Int)
    /// SMBIOS tables that exceed their space below 1 MiB.
    case firmwareTablesTooLarge(size: Int, limit: Int)
    /// A file that cannot be firmware.
    case notFirmware(file: String, reason: String)
    /// Guest RAM refused an access.
    case memory(GuestMemoryError)

    public var description: String {
        switch self {
        case .unreadable(let file, let error):
            "cannot read \(file): \(error.reason)"
        case .notRegular(let file):
            "cannot read \(file): it is not a regular file; write to one what a pipe or device provides"
        case .unreadableContents(let file, let reason):
            "cannot read \(file): \(reason)"
        case .truncated(let file, let wanted, let found):
            "\(file) is truncated: its header refers to data up to byte \(wanted), the file ends at byte \(found)"
        case .notAKernel(let file):
            "\(file) is not a kernel: expected an ELF file or a Linux bzImage"
        case .compressed(let file, let format):
            "\(file) is compressed with \(format); only uncompressed and gzip-compressed kernels are supported: decompress it first"
        case .decompressedTooLarge(let file, let size, let limit):
            "\(file) decompresses to \(size) bytes, but at most \(limit) fit in the guest's memory: give the guest more memory (--mem)"
        case .wrongMachine(let file, let machine):
            "\(file) is an ELF for \(Self.name(ofMachine: machine)) (machine \(machine)); expected x86-64 (machine 62)"
        case .malformed(let file, let reason):
            "\(file) is malformed: \(reason)"
        case .noLoadableSegment(let file):
            "\(file) has no loadable segment: it is an object file or a library, not a linked kernel"
        case .noEntry(let file, let reason):
            "\(file) cannot be entered: \(reason)"
        case .doesNotFit(let file, let start, let end, let limit):
            "\(file) does not fit in the guest's memory: it needs \(hex(start)) to \(hex(end)), "
                + "RAM for a kernel ends at \(hex(limit)): give the guest more memory (--mem)"
        case .reservedMemory(let file, let start, let end):
            "\(file) needs \(hex(start)) to \(hex(end)), which the platform reserves: "
                + "link it at 1 MiB or above, or within 0x10000–0x1ffff or 0x30000–0x9ffff"
        case .initrdDoesNotFit(let file, let size, let free, let limit):
            "the initrd \(file) of \(size) bytes does not fit: \(free) bytes are free for it below \(hex(limit)): "
                + "give the guest more memory (--mem) or a smaller initrd"
        case .commandLineTooLong(let kernel, let length, let added, let limit):
            "the kernel's command line has \(length) bytes\(added > 0 ? ", \(added) of them added by swkvm" : ""); "
                + "\(kernel) accepts at most \(limit): shorten --cmdline"
        case .commandLineHasNUL:
            "the kernel's command line contains a NUL byte"
        case .tablesTooLarge(let size, let limit):
            "the ACPI tables need \(size) bytes and have \(limit): configure fewer CPUs or devices"
        case .firmwareTablesTooLarge(let size, let limit):
            "the SMBIOS tables need \(size) bytes and have \(limit): configure fewer ranges of memory"
        case .notFirmware(let file, let reason):
            "\(file) is not usable as firmware: \(reason)"
        case .memory(let error):
            "\(error)"
        }
    }

    private static func name(ofMachine machine: UInt16) -> String {
        switch machine {
        case 2, 18, 43: "SPARC"
        case 3: "32-bit x86"
        case 8: "MIPS"
        case 20: "PowerPC"
        case 21: "64-bit PowerPC"
        case 22: "S/390"
        case 40: "32-bit ARM"
        case 50: "Itanium"
        case 183: "AArch64"
        case 243: "RISC-V"
        case 247: "BPF"
        case 258: "LoongArch"
        default: "another processor"
        }
    }
}

/// `0x` and hexadecimal digits.
func hex(_ value: UInt64) -> String { "0x" + String(value, radix: 16) }
