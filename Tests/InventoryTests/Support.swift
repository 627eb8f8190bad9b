// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import Testing

@testable import Inventory

/// A directory that goes with the value.
final class TemporaryDirectory: Sendable {
    let path: String

    init() {
        let parent = getenv("TMPDIR").map { String(cString: $0) } ?? P_tmpdir
        var template = Array("\(parent)/swkvm-inventory.XXXXXX".utf8CString)
        path = template.withUnsafeMutableBufferPointer { String(cString: mkdtemp($0.baseAddress!)) }
    }

    deinit { _ = run("chmod -R u+rwx '\(path)'; rm -rf '\(path)'") }

    func write(_ name: String, _ text: String) throws {
        let file = try FileDescriptor.open("\(path)/\(name)", O_WRONLY | O_CREAT | O_TRUNC, mode: 0o600)
        try file.writeAll(Array(text.utf8))
    }

    var inventory: Inventory {
        Inventory(Directories(definitions: path + "/definitions", data: path + "/data", runtime: path + "/run"))
    }
}

/// Runs a shell's commands; returns their status and output.
func run(_ commands: String) -> (status: Int32, output: String) {
    guard let stream = popen(commands, "re") else { return (-1, "") }
    var output: [UInt8] = []
    var room = [UInt8](repeating: 0, count: 64 << 10)
    while true {
        let count = fread(&room, 1, room.count, stream)
        if count == 0 { break }
        output += room[..<count]
    }
    return (pclose(stream) >> 8, String(decoding: output, as: UTF8.self))
}
