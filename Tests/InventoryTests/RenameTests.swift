// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

@testable import Inventory

/// A machine's new name, also when it was given by a process that was killed in between.
@Suite(.timed) struct RenameTests {
    private let directory = TemporaryDirectory()
    private var inventory: Inventory { directory.inventory }
    private let web: MachineName, db: MachineName

    init() throws {
        web = try MachineName("web")
        db = try MachineName("db")
        try inventory.create(web, failure: { $0 }) { (files) throws(InventoryError) in
            _ = run("echo x >'\(files.directory)/disk.qcow2'; mkdir -p '\(directory.path)/run/web'")
            return Definition([.init("cpus", "2")])
        }
    }

    private func exists(_ path: String) -> Bool { fileStatus(ofPath: "\(directory.path)/\(path)") != nil }

    private func rename(_ old: MachineName, _ new: MachineName) throws(InventoryError) {
        try inventory.rename(old, to: new, failure: { $0 }) { (_, definition) throws(InventoryError) in
            Definition(definition.options + [.init("uuid", "x")])
        }
    }

    private func expectRenamed() throws {
        #expect(try inventory.names() == [db])
        #expect(try inventory.definition(of: db).options == [.init("cpus", "2"), .init("uuid", "x")])
        #expect(exists("data/db/disk.qcow2") && !exists("data/web") && !exists("data/db/.renaming"))
        #expect(!exists("data/db/.renaming.new"))
    }

    @Test func aNewName() throws {
        try rename(web, db)
        try expectRenamed()
        #expect(inventory.finishRenames().isEmpty && inventory.sweep().isEmpty)
        let other = try MachineName("other")
        #expect(throws: InventoryError.notDefined(web)) { try rename(web, other) }
    }

    @Test func aNameThatIsTaken() throws {
        try inventory.create(db, failure: { $0 }) { (_) throws(InventoryError) in Definition() }
        #expect(throws: InventoryError.alreadyDefined(db)) { try rename(web, db) }
        try inventory.delete(db)
        _ = run("mkdir '\(directory.path)/data/db'")
        #expect(throws: InventoryError.dataWithoutDefinition(db, directory: directory.path + "/data/db")) {
            try rename(web, db)
        }
        #expect(try inventory.names() == [web])
        #expect(try inventory.definition(of: web).options == [.init("cpus", "2")])
    }

    /// Killed after each of its steps: the next verb finishes it.
    @Test(arguments: 0...3) func whatWasInterruptedIsFinished(steps: Int) throws {
        _ = run(
            """
            cd '\(directory.path)'; printf 'web\\ndb\\ncpus = 2\\nuuid = "x"\\n' >data/web/.renaming
            [ \(steps) -lt 1 ] || mv data/web data/db
            [ \(steps) -lt 2 ] || rm definitions/web.toml
            [ \(steps) -lt 3 ] || { printf 'cpus = 2\\nuuid = "x"\\n' >definitions/db.toml; }
            """)
        let finished = inventory.finishRenames()
        #expect(finished.count == 1 && finished.first?.old == web && finished.first?.new == db)
        try expectRenamed()
    }

    /// Another verb that comes while the directory has its new name and the definition not yet.
    @Test func aMachineBetweenItsNamesIsBusy() throws {
        _ = run(
            """
            cd '\(directory.path)'; printf 'web\ndb\ncpus = 2\nuuid = "x"\n' >data/web/.renaming; mv data/web data/db
            """)
        let mark = try FileLock(FileDescriptor.open(directory.path + "/data/db", O_RDONLY | O_DIRECTORY))
        #expect(throws: InventoryError.busy(web)) { try inventory.change(web) { $0 } }
        #expect(throws: InventoryError.busy(web)) { _ = try inventory.prepareStart(web) }
        #expect(throws: InventoryError.busy(web)) { try inventory.delete(web) }
        #expect(inventory.finishRenames().isEmpty && !exists("data/web") && exists("definitions/web.toml"))
        _ = consume mark
        #expect(inventory.finishRenames().count == 1)
        try expectRenamed()
    }

    /// The name was taken in between: nothing is lost.
    @Test func whatCannotBeFinishedIsForgotten() throws {
        try inventory.create(db, failure: { $0 }) { (_) throws(InventoryError) in Definition() }
        _ = run("printf 'web\\ndb\\ncpus = 4\\n' >'\(directory.path)/data/web/.renaming'")
        #expect(inventory.finishRenames().isEmpty)
        #expect(try inventory.names() == [db, web])
        #expect(try inventory.definition(of: web).options == [.init("cpus", "2")])
        #expect(!exists("data/web/.renaming") && exists("data/web/disk.qcow2"))
    }

    /// A file of that name that says something else is none of a rename's.
    @Test(arguments: ["", "web", "a\nb\nc", "web\n../x\n", "../x\nweb\n"]) func aFileThatIsNoRecord(text: String) throws
    {
        try directory.write("data/web/.renaming", text)
        #expect(inventory.finishRenames().isEmpty)
        #expect(try inventory.names() == [web])
    }

    @Test func changesOfADefinition() throws {
        try inventory.change(web) { Definition($0.options + [.init("mem", "1G")]) }
        #expect(try inventory.definition(of: web).value(of: "mem") == "1G")
        let answer = try inventory.withStopped(web, failure: { $0 }) {
            (files, definition) throws(InventoryError) -> String in
            #expect(throws: InventoryError.busy(web)) { try rename(web, db) }
            return files.directory + " \(definition.options.count)"
        }
        #expect(answer == directory.path + "/data/web 2")
        #expect(throws: InventoryError.notDefined(db)) { try inventory.change(db) { $0 } }
        #expect(!exists("data/db"))
    }
}
