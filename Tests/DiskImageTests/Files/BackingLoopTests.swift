// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// An image cannot become its own backing file, by whatever name.
@Suite(.timed) struct BackingLoopTests {
    let directory = TemporaryDirectory()
    private let contents = randomBytes(1 << 20, seed: 1)

    private func prepare() throws {
        try directory.write("plain.raw", contents)
        qemuImage("convert", "-O", "qcow2", directory.file("plain.raw"), directory.file("disk.qcow2"))
        qemuImage("create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", directory.file("middle.qcow2"))
        qemuImage("create", "-q", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", directory.file("top.qcow2"))
        #expect(link(directory.file("disk.qcow2"), directory.file("hard.qcow2")) == 0)
        #expect(symlink("disk.qcow2", directory.file("soft.qcow2")) == 0)
    }

    private func expectLoop(
        _ what: String, sourceLocation: SourceLocation = #_sourceLocation, _ body: () throws(DiskImageError) -> Void
    ) throws {
        let before = try directory.read("disk.qcow2")
        do throws(DiskImageError) {
            try body()
            Issue.record("\(what) was done", sourceLocation: sourceLocation)
        } catch {
            switch error.cause {
            case .backingLoop, .sameFile: break
            default: Issue.record("\(what): \(error)", sourceLocation: sourceLocation)
            }
        }
        #expect(try directory.read("disk.qcow2") == before, "\(what)", sourceLocation: sourceLocation)
    }

    @Test(arguments: [true, false]) func aNewImageDoesNotReplaceWhatItStandsOn(opensBacking: Bool) throws {
        try prepare()
        for name in [
            "disk.qcow2", "./disk.qcow2", "hard.qcow2", "soft.qcow2", "middle.qcow2", "top.qcow2",
            directory.file("disk.qcow2"),
        ] {
            for target in ["disk.qcow2", "soft.qcow2"] {
                var creation = ImageCreation(path: directory.file(target), format: .qcow2, size: 1 << 20)
                creation.replacing = true
                creation.opensBacking = opensBacking
                creation.backing = BackingReference(name: name, format: .qcow2)
                try expectLoop("\(target) over \(name)") { () throws(DiskImageError) in try creation.create() }
            }
            // Nor does the file with its data.
            var creation = ImageCreation(path: directory.file("new.qcow2"), format: .qcow2, size: 1 << 20)
            creation.replacing = true
            creation.opensBacking = opensBacking
            creation.options.dataFile = "hard.qcow2"
            creation.backing = BackingReference(name: name, format: .qcow2)
            try expectLoop("data of \(name)") { () throws(DiskImageError) in try creation.create() }
        }
        // The other way round nothing is lost.
        var creation = ImageCreation(path: directory.file("top.qcow2"), format: .qcow2)
        creation.replacing = true
        creation.backing = BackingReference(name: "hard.qcow2", format: .qcow2)
        try creation.create()
    }

    @Test func aNewImageThatIsNotThereYet() throws {
        for name in ["new.qcow2", "./new.qcow2", "../\(directory.path.split(separator: "/").last ?? "")/new.qcow2"] {
            var creation = ImageCreation(path: directory.file("new.qcow2"), format: .qcow2, size: 1 << 20)
            creation.opensBacking = false
            creation.backing = BackingReference(name: name, format: .qcow2)
            #expect(
                throws: DiskImageError.backing(
                    of: directory.file("new.qcow2"), .backingLoop(path: directory.file(name)))
            ) { try creation.create() }
            creation.backing = nil
            creation.options.dataFile = name
            #expect(throws: DiskImageError.sameFile(path: directory.file("new.qcow2"), other: directory.file(name))) {
                try creation.create()
            }
        }
    }

    @Test(arguments: [true, false]) func aRebaseMakesNone(isUnsafe: Bool) throws {
        try prepare()
        for name in [
            "disk.qcow2", "./disk.qcow2", "hard.qcow2", "soft.qcow2", "middle.qcow2", "top.qcow2",
            directory.file("hard.qcow2"),
        ] {
            var rebase = ImageRebase(path: directory.file("disk.qcow2"))
            rebase.isUnsafe = isUnsafe
            rebase.backing = BackingReference(name: name, format: .qcow2)
            try expectLoop(name) { () throws(DiskImageError) in try rebase.run() }
        }
    }

    /// What others have made of it is found, by whatever names.
    @Test func loopsOfOthers() throws {
        try prepare()
        qemuImage("rebase", "-u", "-b", "hard.qcow2", "-F", "qcow2", directory.file("disk.qcow2"))
        #expect(throws: DiskImageError.self) {
            _ = try ImageInformation.chain(path: directory.file("disk.qcow2"), locking: false)
        }
        guard case .backingLoop = openError(directory.file("disk.qcow2"), readOnly)?.cause else {
            Issue.record("it was opened"); return
        }
    }

    /// One file is one disk of a machine.
    @Test func aDiskOfTheSameMachine() throws {
        try prepare()
        for (first, second) in [
            ("disk.qcow2", "disk.qcow2"), ("disk.qcow2", "hard.qcow2"), ("disk.qcow2", "top.qcow2"),
            ("top.qcow2", "soft.qcow2"),
        ] {
            let image = try DiskImage(path: directory.file(first))
            var disks = OpenDisks()
            try disks.add(image)
            let error = try #require(openError(directory.file(second)))
            guard
                case .sameDisk(directory.file(second), _, directory.file(first)) = disks.explain(
                    error, opening: directory.file(second))
            else {
                Issue.record("\(first) and \(second): \(error)")
                continue
            }
            // Of somebody else nothing is said.
            #expect(OpenDisks().explain(error, opening: "x") == error)
            _ = consume image
        }
    }
    /// Also where no lock says so.
    @Test func aDiskOfTheSameMachineWithoutLocks() throws {
        try prepare()
        qemuImage("create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", directory.file("other.qcow2"))
        let unlocked = DiskImageOptions(locking: false),
            unlockedToRead = DiskImageOptions(readOnly: true, locking: false)
        func isRefused(_ first: String, _ second: String, _ options: DiskImageOptions...) throws -> Bool {
            var disks = OpenDisks()
            try disks.add(DiskImage(path: directory.file(first), options: options.first ?? unlocked))
            let image = try DiskImage(path: directory.file(second), options: options.last ?? unlocked)
            do throws(DiskImageError) { try disks.add(image) } catch {
                guard case .sameDisk(directory.file(second), _, directory.file(first)) = error else { throw error }
                return true
            }
            return false
        }
        for (first, second) in [
            ("disk.qcow2", "disk.qcow2"), ("disk.qcow2", "hard.qcow2"), ("disk.qcow2", "top.qcow2"),
            ("top.qcow2", "soft.qcow2"),
        ] { #expect(try isRefused(first, second), "\(first), \(second)") }
        #expect(try isRefused("top.qcow2", "disk.qcow2", unlockedToRead, unlocked))
        #expect(try !isRefused("top.qcow2", "disk.qcow2", unlocked, unlockedToRead))
        #expect(try !isRefused("top.qcow2", "other.qcow2"))
        // Several paths to one disk.
        #expect(try !isRefused("plain.raw", "plain.raw"))
    }
}
