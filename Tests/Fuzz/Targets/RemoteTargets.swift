// SPDX-License-Identifier: Apache-2.0

import CLinux
import DiskImage
import Glibc
import Linux

extension FuzzTarget {
    /// What a server of a remote disk says, from its greeting to the end of the connection. The first byte tells what
    /// is done with the disk.
    static let nbd = FuzzTarget(name: "nbd", seeds: [mapped(), used(isStructured: true), used(isStructured: false)]) {
        bytes in
        guard let kind = bytes.first else { return false }
        var ends: [Int32] = [0, 0]
        guard socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0, &ends) == 0 else {
            fatalError("socketpair")
        }
        let ours = FileDescriptor(owning: ends[0]), server = ends[1]
        defer { close(server) }
        // All that it will ever say, as far as there is room, and the end of it.
        _ = bytes.withUnsafeBytes {
            send(server, $0.baseAddress! + 1, $0.count - 1, Int32(MSG_DONTWAIT | MSG_NOSIGNAL))
        }
        shutdown(server, Int32(SHUT_WR))
        let isReadOnly = kind & 2 != 0
        guard
            let image = try? DiskImage(
                path: "nbd://fuzz/", options: DiskImageOptions(readOnly: isReadOnly), socket: ours)
        else { return false }
        let size = image.size
        precondition(size % 512 == 0 && size <= DiskImage.maximumSize, "a disk of \(size) bytes")
        if kind & 1 == 0 { map(image) } else { use(image, isReadOnly: isReadOnly) }
        return true
    }

    private static func map(_ image: DiskImage) {
        let size = image.size
        var map = ImageMap(image), position: UInt64 = 0, steps = 0
        while steps < 200, let extent = try? map.next() {
            precondition(
                extent.offset == position && extent.length > 0 && extent.length <= size - position,
                "an extent \(extent)")
            position += extent.length
            steps += 1
        }
    }

    private static func use(_ image: DiskImage, isReadOnly: Bool) {
        let size = image.size
        guard var engine = try? DiskEngine(image, depth: 4, segments: 4) else { fatalError("DiskEngine") }
        var memory = [UInt8](repeating: 0x5a, count: Int(min(size, 512)))
        let last = size - UInt64(memory.count)
        memory.withUnsafeMutableBytes { buffer in
            _ = try? engine.perform(.read, at: 0, memory: buffer)
            if !isReadOnly {
                _ = try? engine.perform(.write, at: 0, memory: buffer)
                _ = try? engine.perform(.flush)
                _ = try? engine.perform(.discard, at: 0, length: size)
                _ = try? engine.perform(.writeZeroes, at: 0, length: UInt64(buffer.count))
            }
            _ = try? engine.perform(.read, at: last, memory: buffer)
        }
    }

    // MARK: - Seeds

    /// What a server says up to a disk of 1 MiB that can do everything.
    private static func greeting(isStructured: Bool) -> [UInt8] {
        func reply(_ option: UInt64, _ type: UInt64, _ payload: [UInt8] = []) -> [UInt8] {
            big(0x3_e889_0455_65a9, 8) + big(option, 4) + big(type, 4) + big(UInt64(payload.count), 4) + payload
        }
        let unknown: UInt64 = 1 << 31 | 1
        var bytes = Array("NBDMAGICIHAVEOPT".utf8) + big(3, 2)
        bytes += isStructured ? reply(8, 1) : reply(8, unknown)
        // Contexts are asked for where replies are structured.
        if isStructured { bytes += reply(10, 4, big(1, 4) + Array("base:allocation".utf8)) + reply(10, 1) }
        bytes +=
            reply(7, 3, big(0, 2) + big(1 << 20, 8) + big(0x6d, 2))
            + reply(7, 3, big(3, 2) + big(1, 4) + big(4096, 4) + big(32 << 20, 4))
        return bytes + reply(7, 1)
    }

    private static func chunk(_ cookie: UInt64, _ type: UInt64, _ payload: [UInt8] = [], isLast: Bool = true) -> [UInt8]
    {
        big(0x668e_33ef, 4) + big(isLast ? 1 : 0, 2) + big(type, 2) + big(cookie, 8) + big(UInt64(payload.count), 4)
            + payload
    }

    /// Data, a hole, and data.
    private static func mapped() -> [UInt8] {
        let pieces: [(UInt64, UInt64)] = [(64 << 10, 0), (512 << 10, 3), (448 << 10, 0)]
        return [0] + greeting(isStructured: true)
            + chunk(1, 5, big(1, 4) + pieces.flatMap { big($0.0, 4) + big($0.1, 4) })
    }

    /// A read, a write, a flush, a trim, zeroes, and a read.
    private static func used(isStructured: Bool) -> [UInt8] {
        let data = (0..<512).map { UInt8(truncatingIfNeeded: $0) }
        var bytes = [1] + greeting(isStructured: isStructured)
        for cookie in 1...6 as ClosedRange<UInt64> {
            let isRead = cookie == 1 || cookie == 6
            if !isStructured {
                bytes += big(0x6744_6698, 4) + big(0, 4) + big(cookie, 8) + (isRead ? data : [])
            } else if cookie == 1 {
                bytes +=
                    chunk(1, 1, big(0, 8) + data.prefix(256), isLast: false) + chunk(1, 2, big(256, 8) + big(256, 4))
            } else if cookie == 6 {
                bytes += chunk(6, 1 << 15 | 1, big(5, 4) + big(3, 2) + Array("bad".utf8))
            } else {
                bytes += chunk(cookie, 0)
            }
        }
        return bytes
    }

    private static func big(_ value: UInt64, _ width: Int) -> [UInt8] {
        (0..<width).map { UInt8(truncatingIfNeeded: value >> UInt64(8 * (width - 1 - $0))) }
    }
}
