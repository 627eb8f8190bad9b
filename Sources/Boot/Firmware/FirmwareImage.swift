// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
public import GuestMemory
internal import Linux
internal import Platform

/// The contents of a firmware file in memory, from where a guest executes it: at the end of the first 4 GiB, with the
/// reset vector in its last 16 bytes.
@safe public final class FirmwareImage: Sendable {
    /// Its path, for messages.
    public let name: String
    /// Bytes, a multiple of 4096.
    public let size: UInt64
    /// Where a guest finds its first byte.
    public var address: UInt64 { PhysicalLayout.firmware.upperBound - size }
    /// The first byte in this process; nothing writes there, and it is mapped as long as this object lives.
    public var host: UnsafeMutableRawPointer { unsafe mapping.start }

    private let mapping: Mapping

    private static let sizes: ClosedRange<UInt64> =
        0x1_0000...PhysicalLayout.firmware.upperBound
        - PhysicalLayout.firmware.lowerBound

    /// Reads a file.
    /// - Throws: ``BootError/unreadable(file:_:)``, ``BootError/notFirmware(file:reason:)`` and what else is wrong with
    ///   it.
    public init(path: String) throws(BootError) {
        let file = try BootFile(path: path)
        guard Self.sizes.contains(file.size), file.size % 4096 == 0 else {
            throw .notFirmware(
                file: path,
                reason:
                    "it has \(file.size) bytes, expected a multiple of 4096 from 64 KiB to \(Self.sizes.upperBound >> 20) MiB"
            )
        }
        // A firmware volume has its signature 40 bytes from its beginning (UEFI PI 1.8, volume 3, §3.2.1).
        guard try file.read(at: 40, count: 4) != Array("_FVH".utf8) else {
            throw .notFirmware(
                file: path,
                reason:
                    "it is UEFI firmware, which needs a chipset that machines of swkvm do not have; expected SeaBIOS, or omit --firmware"
            )
        }
        do throws(SystemCallError) {
            mapping = try Mapping(size: Int(file.size), flags: MAP_PRIVATE | MAP_ANONYMOUS)
        } catch { throw .unreadable(file: path, error) }
        name = path
        size = file.size
        // All of the mapping, before anything else has it.
        unsafe try file.read(at: 0, into: UnsafeMutableRawBufferPointer(start: mapping.start, count: Int(file.size)))
        let vector = try file.read(at: file.size - 16, count: 8)
        guard vector.contains(where: { $0 != vector[0] }) else {
            throw .notFirmware(
                file: path,
                reason:
                    "there is no code at the reset vector, 16 bytes before its end; expected a file such as bios-microvm.bin"
            )
        }
    }

    /// Copies its end to the end of the first MiB, where the code that a processor starts with continues.
    public func copy(into memory: GuestMemory) throws(BootError) {
        guard memory.size > PhysicalLayout.highRAM else {
            throw .doesNotFit(file: name, start: 0, end: PhysicalLayout.highRAM, limit: memory.size)
        }
        let count = min(size, PhysicalLayout.firmwareCopySize)
        let target = GuestAddress(PhysicalLayout.highRAM - count)
        do throws(GuestMemoryError) {
            // The last bytes of the mapping.
            let bytes = unsafe UnsafeRawBufferPointer(start: host + Int(size - count), count: Int(count))
            unsafe try memory.ram.write(bytes.bytes, at: target)
        } catch { throw .memory(error) }
    }
}
