// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// Directory listings, and files that are written in one step.
@Suite(.timed) final class FilesTests {
    private let directory: String
    private var path: String { directory + "/file" }

    init() throws {
        var template = Array("/tmp/swkvm-files.XXXXXX".utf8CString)
        try #require(mkdtemp(&template) != nil)
        directory = String(decoding: template.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    deinit {
        for name in (try? names()) ?? [] {
            removeName("\(directory)/\(name)")
            rmdir("\(directory)/\(name)")
        }
        rmdir(directory)
    }

    private func names() throws -> [String] { try namesInDirectory(directory) }

    @Test func aListing() throws {
        #expect(try names() == [])
        for name in ["b", ".a", "c"] { try writeFile("\(directory)/\(name)", []) }
        let raw = String(raw: [0x6d, 0xe9])
        try writeFile("\(directory)/\(raw)", [])
        #expect(try names() == [".a", "b", "c", raw])
        #expect(throws: SystemCallError("opendir", errno: ENOENT)) { try namesInDirectory(path + "/none") }
        #expect(throws: SystemCallError("opendir", errno: ENOTDIR)) { try namesInDirectory(directory + "/b") }
    }

    @Test func aNewFileAndItsReplacement() throws {
        // More than a usual umask leaves.
        try writeFile(path, [1, 2], mode: 0o666)
        #expect(try readFile(path, limit: 8) == [1, 2])
        #expect(fileStatus(ofPath: path)?.st_mode == S_IFREG | 0o666)
        // What a killed process has left does not count.
        try FileDescriptor.open(path + ".new", O_WRONLY | O_CREAT, mode: 0o600).writeAll([9, 9, 9])
        try writeFile(path, [3])
        #expect(try readFile(path, limit: 8) == [3])
        #expect(fileStatus(ofPath: path)?.st_mode == S_IFREG | 0o600)
        #expect(try names() == ["file"])
    }

    @Test func aFileThatMustNotExist() throws {
        let other = directory + "/other"
        try writeFile(path, [1], replaces: false, temporary: other)
        #expect(throws: SystemCallError("link", errno: EEXIST)) {
            try writeFile(path, [2], replaces: false, temporary: other)
        }
        #expect(try readFile(path, limit: 8) == [1])
        #expect(try names() == ["file"])
    }

    @Test func aFailureLeavesNothing() throws {
        #expect(mkdir(path, 0o700) == 0)
        #expect(throws: SystemCallError("rename", errno: EISDIR)) { try writeFile(path, [1]) }
        #expect(try names() == ["file"])
    }
}
