// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// A file of a machine that grows while it is printed, and whose contents move to the file beside it when it is full
/// (``FileRotation``).
final class Log {
    private let path: String
    private var file: FileDescriptor
    private var offset: UInt64 = 0
    /// The last bytes before ``offset``, by which they are found again after a rotation.
    private var tail: [UInt8] = []
    /// When the file beside it was last written: each rotation changes it, and none happens while it stays the same.
    private var rotation: Int?
    private let isTerminal = isatty(STDOUT_FILENO) == 1

    private static let window = 64 << 10
    private static let tailLength = 256
    /// Microseconds between two looks.
    private static let pause: UInt32 = 200_000

    init(_ path: String) throws(SystemCallError) {
        self.path = path
        file = try FileDescriptor.open(path, O_RDONLY | O_NOCTTY)
        rotation = lastRotation
    }

    /// Prints what there is.
    func printAll() { while let bytes = next() { show(bytes) } }

    /// Prints so many lines from the end. The last one need not be complete.
    func printEnd(lines: Int) {
        offset = (try? file.size()) ?? 0
        var missing = lines
        var isFirst = true
        while offset > 0 {
            let start = offset > UInt64(Self.window) ? offset - UInt64(Self.window) : 0
            let bytes = read(file, at: start, count: Int(offset - start))
            for index in bytes.indices.reversed() where bytes[index] == UInt8(ascii: "\n") {
                // The newline at the very end begins no line.
                if !(isFirst && index == bytes.count - 1) { missing -= 1 }
                guard missing > 0 else {
                    offset = start + UInt64(index) + 1
                    return printAll()
                }
            }
            isFirst = false
            offset = start
        }
        if lines > 0 { printAll() }
    }

    // MARK: What is added

    /// Prints what is added, until a signal ends the process.
    func follow() {
        var hasMoved = false
        while true {
            // Read before it is known whether these are bytes of the file as it was before.
            while let bytes = next() {
                guard lastRotation == rotation, !hasMoved else {
                    offset -= UInt64(bytes.count)
                    break
                }
                show(bytes)
            }
            usleep(Self.pause)
            let now = lastRotation
            if now != rotation {
                // It is being written, or has been.
                hasMoved = true
                rotation = now
            } else if hasMoved {
                hasMoved = false
                printMoved()
            } else if let size = try? file.size(), size < offset {
                // Emptied by somebody else.
                offset = 0
                tail = []
            }
        }
    }

    /// Nanoseconds; nil where there is no such file.
    private var lastRotation: Int? {
        fileStatus(ofPath: path + ".1").map { $0.st_mtim.tv_sec &* 1_000_000_000 &+ $0.st_mtim.tv_nsec }
    }

    /// Prints what had not been printed when the file's contents moved, and begins anew. The copy has the same offsets.
    private func printMoved() {
        guard let older = try? FileDescriptor.open(path + ".1", O_RDONLY | O_NOCTTY) else { return offset = 0 }
        let known = read(older, at: offset - min(offset, UInt64(tail.count)), count: tail.count)
        if known != tail {
            StandardError().say(
                "\(path.printable) was rotated more than once since it was last read: output is missing here")
            offset = 0
        }
        while true {
            let bytes = read(older, at: offset, count: Self.window)
            if bytes.isEmpty { break }
            offset += UInt64(bytes.count)
            show(bytes)
        }
        offset = 0
        tail = []
    }

    private func read(_ file: borrowing FileDescriptor, at offset: UInt64, count: Int) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        let number = file.rawValue
        // Into the array, as long as it is.
        let read = unsafe bytes.withUnsafeMutableBytes {
            unsafe pread(number, $0.baseAddress, $0.count, off_t(clamping: offset))
        }
        return Array(bytes[..<max(0, read)])
    }

    /// - Returns: nil at the end.
    private func next() -> [UInt8]? {
        let bytes = read(file, at: offset, count: Self.window)
        offset += UInt64(bytes.count)
        return bytes.isEmpty ? nil : bytes
    }

    private func show(_ bytes: [UInt8]) {
        tail = Array((tail + bytes).suffix(Self.tailLength))
        var output = bytes
        if isTerminal {
            // A character may be cut in two at the end of a window: its bytes are then shown as such.
            let lines = bytes.split(separator: UInt8(ascii: "\n"), omittingEmptySubsequences: false)
            output = Array(
                lines.map { line in String(raw: line.last == 0x0d ? line.dropLast() : line).printable }
                    .joined(separator: "\n").utf8)
        }
        var rest = output[...]
        while !rest.isEmpty {
            let count = unsafe rest.withUnsafeBytes { unsafe write(STDOUT_FILENO, $0.baseAddress, $0.count) }
            if count < 0, errno == EINTR { continue }
            // SIGPIPE is blocked: a reader that has gone ends the program, too.
            guard count > 0 else { Command.end(MachineTool.failure, outputError: errno) }
            rest.removeFirst(count)
        }
    }
}
