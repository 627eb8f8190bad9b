// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux

/// Runs programs that know the tables' formats.
enum Tool {
    /// ACPICA's compiler.
    static var iasl: String? { ["/usr/bin/iasl", "/usr/local/bin/iasl"].first { unsafe access($0, X_OK) == 0 } }
    static var dmidecode: String? {
        ["/usr/sbin/dmidecode", "/usr/bin/dmidecode"].first { unsafe access($0, X_OK) == 0 }
    }

    /// Output and exit status of a program that ends by itself.
    static func run(_ program: String, _ arguments: [String]) throws -> (output: String, status: Int32) {
        var ends: [Int32] = [0, 0]
        guard unsafe pipe(&ends) == 0 else { throw SystemCallError.last("pipe") }
        let output = FileDescriptor(owning: ends[0])
        var actions = unsafe posix_spawn_file_actions_t()
        unsafe posix_spawn_file_actions_init(&actions)
        defer { unsafe posix_spawn_file_actions_destroy(&actions) }
        unsafe posix_spawn_file_actions_adddup2(&actions, ends[1], 1)
        unsafe posix_spawn_file_actions_adddup2(&actions, ends[1], 2)
        unsafe posix_spawn_file_actions_addclose(&actions, ends[0])
        var strings = unsafe ([program] + arguments).map { unsafe strdup($0) } + [nil]
        defer { unsafe strings.forEach { unsafe free($0) } }
        var child: pid_t = 0
        let result = unsafe posix_spawn(&child, program, &actions, nil, &strings, nil)
        close(ends[1])
        guard result == 0 else { throw SystemCallError("posix_spawn", errno: result) }
        var text: [UInt8] = []
        var chunk = [UInt8](repeating: 0, count: 4096)
        while true {
            let count = try unsafe chunk.withUnsafeMutableBytes { unsafe try output.read(into: $0) }
            if count == 0 { break }
            text += chunk[..<count]
        }
        var status: Int32 = 0
        unsafe waitpid(child, &status, 0)
        return (String(decoding: text, as: UTF8.self), status >> 8)
    }

    static func removeDirectory(_ path: String) {
        guard let directory = unsafe opendir(path) else { return }
        while let entry = unsafe readdir(directory) {
            let name = unsafe withUnsafePointer(to: &entry.pointee.d_name) {
                unsafe $0.withMemoryRebound(to: CChar.self, capacity: 256) { unsafe String(cString: $0) }
            }
            if name != ".", name != ".." { unsafe unlink("\(path)/\(name)") }
        }
        unsafe closedir(directory)
        unsafe rmdir(path)
    }
}
