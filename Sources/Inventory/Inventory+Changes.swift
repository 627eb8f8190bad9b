// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// Changes of a machine that does not run.
extension Inventory {
    /// Locks a machine that does not run, for as long as `body` works on what is in its directory.
    /// - Throws: `notDefined`, `running`, `busy`, or what `body` throws.
    public func withStopped<Answer, Failure: Error>(
        _ name: MachineName, failure: (InventoryError) -> Failure,
        _ body: (MachineFiles, Definition) throws(Failure) -> Answer
    ) throws(Failure) -> Answer {
        let lock: FileLock
        do throws(InventoryError) { lock = try lockStopped(name) } catch { throw failure(error) }
        let before: Definition
        do throws(InventoryError) { before = try definition(of: name) } catch { throw failure(error) }
        let answer = try body(MachineFiles(name, directories), before)
        _ = consume lock
        return answer
    }

    /// Replaces the definition of a machine, which may run and keeps then what it was started with.
    public func change(_ name: MachineName, _ body: (Definition) -> Definition) throws(InventoryError) {
        let files = try files(of: name)
        let lock = try lockDefined(files)
        let after = body(try definition(of: name))
        try write(DefinitionText.text(of: after), files, replaces: true)
        _ = consume lock
    }

    /// Replaces the definition of a machine that is locked by ``withStopped(_:failure:_:)``.
    public func store(_ definition: Definition, for name: MachineName) throws(InventoryError) {
        try write(DefinitionText.text(of: definition), MachineFiles(name, directories), replaces: true)
    }

    /// - Throws: `notDefined`, `running`, `busy`.
    func lockStopped(_ name: MachineName) throws(InventoryError) -> FileLock {
        let files = try files(of: name)
        let lock = try lockDefined(files)
        try checkIsStopped(files)
        return lock
    }

    /// Locks the directory of a machine that was defined a moment ago, and creates it if there is none.
    private func lockDefined(_ files: MachineFiles) throws(InventoryError) -> FileLock {
        try Directories.create(files.directory)
        let lock = try lock(files)
        // The directory of a machine that is being renamed has its new name before the definition has.
        if try list(files.directory).isEmpty, isBeingRenamed(files.name) {
            removeTree(files.directory)
            throw .busy(files.name)
        }
        // Deleted or renamed meanwhile, by the one that had the lock.
        guard fileStatus(ofPath: files.definition) != nil else {
            removeTree(files.directory)
            throw .notDefined(files.name)
        }
        return lock
    }
}
