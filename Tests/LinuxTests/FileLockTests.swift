// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

@Suite(.timed) struct FileLockTests {
    @Test func keepsOthersOut() throws {
        let lock = try FileLock(open())
        #expect(throws: SystemCallError("flock", errno: EWOULDBLOCK)) { _ = try FileLock(open()) }
        _ = consume lock
        _ = try FileLock(open())
    }

    /// A process that another thread forks at that moment has the same open file.
    @Test func endsAlsoWhileAnotherProcessHasTheFile() throws {
        let file = try open()
        let ofAnotherProcess = try file.duplicate()
        _ = try FileLock(file)
        _ = try FileLock(open())
        _ = consume ofAnotherProcess
    }

    /// A file of the test's own: the tests of a suite run at the same time.
    private final class File {
        let path: String

        init() throws {
            var template = Array("/tmp/swkvm-lock.XXXXXX".utf8CString)
            let file = mkstemp(&template)
            try #require(file >= 0)
            close(file)
            path = String(decoding: template.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
        }

        deinit { unlink(path) }

        func open() throws -> FileDescriptor { try FileDescriptor.open(path, O_RDONLY) }
    }

    private let lockFile: File

    init() throws { lockFile = try File() }

    private func open() throws -> FileDescriptor { try lockFile.open() }
}
