// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

@testable import Inventory

/// Machines as files: made, changed and removed, also by a process that is killed in between.
@Suite(.timed) struct InventoryTests {
    private struct Failure: Error, Equatable {
        var inventory: InventoryError?
    }

    private let directory = TemporaryDirectory()
    private var inventory: Inventory { directory.inventory }
    private let web: MachineName

    init() throws { web = try MachineName("web") }

    private func create(
        _ name: MachineName, _ body: (MachineFiles) throws(Failure) -> Definition = { _ in Definition() }
    ) throws(Failure) {
        try inventory.create(name, failure: { Failure(inventory: $0) }, body)
    }

    private func exists(_ path: String) -> Bool { fileStatus(ofPath: "\(directory.path)/\(path)") != nil }

    @Test func aMachineFromBeginningToEnd() throws {
        #expect(try inventory.names() == [])
        #expect(throws: InventoryError.notDefined(web)) { try inventory.definition(of: web) }
        try create(web) { files in
            #expect(files.directory == directory.path + "/data/web")
            _ = run("echo x >'\(files.directory)/disk.qcow2'")
            return Definition([.init("cpus", "2")])
        }
        #expect(try inventory.names() == [web])
        #expect(try inventory.definition(of: web).value(of: "cpus") == "2")
        #expect(try inventory.files(of: web).runningProcess() == nil)
        // For this user alone.
        for path in ["definitions", "data", "data/web", "definitions/web.toml"] {
            #expect(try #require(fileStatus(ofPath: "\(directory.path)/\(path)")).st_mode & 0o077 == 0, "\(path)")
        }
        #expect(throws: Failure(inventory: .alreadyDefined(web))) { try create(web) }
        #expect(exists("data/web/disk.qcow2"))
        try inventory.delete(web)
        #expect(!exists("data/web") && !exists("definitions/web.toml"))
        #expect(throws: InventoryError.notDefined(web)) { try inventory.delete(web) }
        #expect(run("ls -A '\(directory.path)/definitions' '\(directory.path)/data'").output.contains("web") == false)
    }

    @Test func nothingIsLeftOfAFailure() throws {
        #expect(throws: Failure()) {
            try create(web) { files throws(Failure) in
                _ = run("mkdir -p '\(files.directory)/a/b'; echo x >'\(files.directory)/a/b/c'")
                throw Failure()
            }
        }
        #expect(!exists("data/web") && !exists("definitions/web.toml"))
        try create(web)
    }

    /// Another host may see the directory of an NFS server without the lock that `create` has on it here.
    @Test func whatAnotherHostCreatesIsNotRemoved() throws {
        func isLocked(_ path: String) -> Bool {
            do { _ = try FileLock(FileDescriptor.open(path, O_WRONLY)) } catch { return true }
            return false
        }
        try create(web) { files in
            #expect(isLocked(files.directory + "/.unfinished"))
            return Definition()
        }
        _ = run("cd '\(directory.path)/data' && mkdir db && touch db/.unfinished db/disk.qcow2")
        let db = try MachineName("db")
        do {
            let lock = try FileLock(FileDescriptor.open(directory.path + "/data/db/.unfinished", O_WRONLY))
            #expect(inventory.sweep() == [])
            #expect(throws: Failure(inventory: .busy(db))) { try create(db) }
            #expect(exists("data/db/disk.qcow2"))
            _ = consume lock
        }
        #expect(inventory.sweep() == [db])
        #expect(!exists("data/db"))
    }

    /// As `kill -9` leaves it.
    @Test func theRestOfAKilledCreateIsRemoved() throws {
        try create(web)
        // Killed while it fills the directory; and just before its last step.
        _ = run("cd '\(directory.path)/data' && mkdir db && touch db/.unfinished db/disk.qcow2 web/.unfinished")
        let db = try MachineName("db")
        #expect(inventory.sweep() == [db])
        #expect(!exists("data/db") && exists("data/web") && !exists("data/web/.unfinished"))
        #expect(inventory.sweep() == [])
        // Another create of the name cleans up by itself.
        _ = run("cd '\(directory.path)/data' && mkdir db && touch db/.unfinished db/disk.qcow2")
        try create(db) { files in
            #expect(!exists("data/db/disk.qcow2"))
            return Definition()
        }
        #expect(try inventory.names() == [db, web])
    }

    @Test func whatIsOnlyBegunIsRemoved() throws {
        try create(web)
        // A create before its first file; definitions that were not put in their place.
        _ = run(
            "cd '\(directory.path)' && mkdir data/db && echo >definitions/.db.new && echo >definitions/.web.new && touch data/web/.snapshot.new data/web/.renaming.new"
        )
        let lock = try FileLock(FileDescriptor.open(directory.path + "/data/web", O_RDONLY | O_DIRECTORY))
        #expect(inventory.sweep() == [])
        #expect(!exists("data/db") && exists("data/web") && exists("definitions/web.toml"))
        #expect(exists("definitions/.web.new") && exists("data/web/.snapshot.new"), "their writer is at work")
        _ = consume lock
        #expect(inventory.sweep() == [])
        #expect(!exists("definitions/.web.new"))
        #expect(!exists("data/web/.snapshot.new") && !exists("data/web/.renaming.new") && exists("data/web"))
        _ = run("cd '\(directory.path)' && echo >definitions/.db.new")
        #expect(inventory.sweep() == [])
        #expect(!exists("definitions/.db.new"))
    }

    /// A verb that looks for rests does not disturb one that has just begun.
    @Test func sweepsDoNotDisturbACreate() async throws {
        try create(web)
        let (inventory, names) = (self.inventory, try (0..<100).map { try MachineName("m\($0)") })
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask { for _ in 0..<400 { #expect(inventory.sweep() == []) } }
            group.addTask {
                for name in names {
                    try inventory.create(name, failure: { Failure(inventory: $0) }) { _ throws(Failure) in
                        Definition()
                    }
                }
            }
            try await group.waitForAll()
        }
        #expect(try inventory.names().count == 101)
    }

    /// Data that nobody calls unfinished is not removed.
    @Test func dataOfAnUndefinedMachineStays() throws {
        try create(web)
        _ = run("cd '\(directory.path)' && rm definitions/web.toml && echo precious >data/web/disk.qcow2")
        #expect(
            throws: Failure(inventory: .dataWithoutDefinition(web, directory: directory.path + "/data/web"))
        ) { try create(web) }
        #expect(inventory.sweep() == [])
        #expect(exists("data/web/disk.qcow2"))
    }

    @Test func oneProcessAtATimeChangesAMachine() throws {
        try create(web)
        let lock = try FileDescriptor.open(directory.path + "/data/web", O_RDONLY | O_DIRECTORY)
        #expect(flock(lock.rawValue, LOCK_EX) == 0)
        #expect(throws: InventoryError.busy(web)) { try inventory.delete(web) }
        #expect(throws: InventoryError.busy(web)) { try inventory.replaceDefinition(of: web, [], by: []) }
        var error: InventoryError?
        do throws(InventoryError) { _ = try inventory.prepareStart(web) } catch let caught { error = caught }
        #expect(error == .busy(web))
        _ = run("touch '\(directory.path)/data/web/.unfinished'; rm '\(directory.path)/definitions/web.toml'")
        #expect(throws: Failure(inventory: .busy(web))) { try create(web) }
        #expect(inventory.sweep() == [])
        #expect(flock(lock.rawValue, LOCK_UN) == 0)
        #expect(inventory.sweep() == [web])
    }

    @Test func aDefinitionIsReplacedIfItIsOne() throws {
        try create(web)
        let before = try readFile(directory.path + "/definitions/web.toml", limit: 1 << 20)
        try inventory.replaceDefinition(of: web, before, by: Array("cpus = 4".utf8))
        #expect(throws: InventoryError.changedMeanwhile(web)) {
            try inventory.replaceDefinition(of: web, before, by: Array("cpus = 5".utf8))
        }
        #expect(try inventory.definition(of: web).value(of: "cpus") == "4")
        #expect(throws: InventoryError.self) {
            try inventory.replaceDefinition(of: web, Array("cpus = 4".utf8), by: Array("cpus".utf8))
        }
        #expect(try inventory.definition(of: web).value(of: "cpus") == "4")
    }

    @Test func aDefinitionWithAMistake() throws {
        try create(web)
        try directory.write("definitions/web.toml", "cpus = 2\nmem = 2G\n")
        do throws(InventoryError) {
            _ = try inventory.definition(of: web)
            Issue.record("it was read")
        } catch {
            #expect(error.description.hasPrefix("\(directory.path)/definitions/web.toml, line 2: the value of 'mem'"))
        }
        // What is no machine's name is no machine.
        try directory.write("definitions/-x.toml", "")
        try directory.write("definitions/notes.txt", "")
        #expect(try inventory.names() == [web])
    }

    @Test func aDirectoryOfOthersIsRefused() throws {
        _ = run("mkdir '\(directory.path)/data' && chmod 0777 '\(directory.path)/data'")
        #expect(throws: Failure(inventory: .unsafeDirectory(directory.path + "/data"))) { try create(web) }
    }

    /// A link in a machine's directory leads nowhere when the machine is deleted.
    @Test func linksAreNotFollowed() throws {
        try create(web)
        _ = run(
            "cd '\(directory.path)' && mkdir other && touch other/file && ln -s ../../other data/web/link && ln -s ../other data/l"
        )
        try inventory.delete(web)
        #expect(exists("other/file") && !exists("data/web"))
        #expect(inventory.sweep() == [])
    }
}
