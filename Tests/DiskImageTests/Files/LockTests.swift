// SPDX-License-Identifier: Apache-2.0

import CLinux
@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

@Suite(.timed) struct LockTests {
    let directory = TemporaryDirectory()

    @Test func aWriterExcludesEverybodyElse() throws {
        let path = try directory.write("disk.raw", [UInt8](repeating: 0, count: 4096))
        let writer = try DiskImage(path: path)
        #expect(openError(path) == .locked(path: path, forWriting: true))
        #expect(openError(path, readOnly) == .locked(path: path, forWriting: true))
        // QEMU's tools are kept out, too. (They bear others' writing to a raw disk that they only read.)
        #expect(run(["qemu-io", "-f", "raw", "-c", "write 0 512", path], outlastsLocks: false).output.contains("lock"))
        // Without locks nothing is reported.
        _ = try DiskImage(path: path, options: DiskImageOptions(locking: false))
        withExtendedLifetime(writer.size) {}
    }

    @Test func readersShareAndExcludeWriters() throws {
        let path = try directory.write("disk.raw", [UInt8](repeating: 0, count: 4096))
        let first = try DiskImage(path: path, options: readOnly)
        let second = try DiskImage(path: path, options: readOnly)
        let error = try #require(openError(path))
        #expect(error == .locked(path: path, forWriting: false))
        #expect("\(error)".contains(path))
        #expect(run(["qemu-io", "-r", "-f", "raw", "-c", "read 0 512", path]).status == 0)
        #expect(run(["qemu-io", "-f", "raw", "-c", "write 0 512", path], outlastsLocks: false).output.contains("lock"))
        withExtendedLifetime((first.size, second.size)) {}
    }

    @Test func theLockGoesWithTheImage() throws {
        let path = try directory.write("disk.raw", [UInt8](repeating: 0, count: 4096))
        do { _ = try DiskImage(path: path) }
        _ = try DiskImage(path: path)
        #expect(run(["qemu-io", "-f", "raw", "-c", "write 0 512", path]).status == 0)
    }

    /// A lease, which a server of files has for a client, is waited for: then the locks that the client had are seen.
    @Test(arguments: [false, true]) func aLeaseIsWaitedFor(hasLock: Bool) throws {
        let path = try directory.write("disk.raw", [UInt8](repeating: 0, count: 4096))
        let holder = try FileDescriptor.open(path, O_RDONLY), number = holder.rawValue
        // The kernel asks for it by this signal.
        let before = signal(SIGIO, SIG_IGN)
        defer { signal(SIGIO, before) }
        let setLease: Int32 = 1024, getLease: Int32 = 1025
        try #require(clinux_fcntl_value(number, setLease, Int(F_RDLCK)) == 0)
        let client = try Thread.start(name: "client") {
            while clinux_fcntl_value(number, getLease, 0) == F_RDLCK { usleep(1000) }
            if hasLock { _ = clinux_ofd_lock(number, Int16(F_RDLCK), 201, 1) }
            _ = clinux_fcntl_value(number, setLease, Int(F_UNLCK))
        }
        if hasLock {
            #expect(openError(path) == .locked(path: path, forWriting: false))
        } else {
            _ = try DiskImage(path: path)
        }
        client.join()
    }

    @Test func qemuExcludesUs() throws {
        let path = try directory.write("disk.raw", [UInt8](repeating: 0, count: 4096))
        let overlay = directory.file("overlay.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-b", path, "-F", "raw", overlay)
        // qemu-io has the image open until its input ends, and certainly after its first answer.
        let qemu = try RunningProgram(["qemu-io", "-f", "raw", path])
        try qemu.stream.writeAll("write 0 512\n".utf8)
        var seen = ""
        while !seen.contains("ops") {
            let more = qemu.read()
            if more.isEmpty { break }
            seen += String(decoding: more, as: UTF8.self)
        }
        #expect(seen.contains("ops"), "qemu-io: \(seen)")
        #expect(openError(path) == .locked(path: path, forWriting: true))
        #expect(openError(path, readOnly) == .locked(path: path, forWriting: true))
        #expect(openError(overlay, readOnly) == .backing(of: overlay, .locked(path: path, forWriting: true)))
        qemu.endInput()
        #expect(qemu.wait() == 0)
        _ = try DiskImage(path: path)
    }
}
