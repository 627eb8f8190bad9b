// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// The defined machines of a user. There is no daemon: files and locks are all there is, and each verb looks at them
/// anew.
///
/// A machine exists if its definition does. Its directory is locked (flock(2)) by the verb that changes the machine. A
/// directory without a definition that has the file `.unfinished` is the rest of a `create` or `delete` that was
/// killed: ``sweep()`` removes it.
public struct Inventory: Sendable {
    public let directories: Directories

    public init(_ directories: Directories) { self.directories = directories }

    /// Checks that nobody else can change what the directories have, or put others in their place.
    /// - Throws: `unsafeDirectory`.
    public func checkDirectories() throws(InventoryError) {
        for path in [directories.definitions, directories.data, directories.runtime] { try Directories.check(path) }
    }

    /// All machines, by name.
    /// - Throws: when the directory of definitions is there and cannot be read.
    public func names() throws(InventoryError) -> [MachineName] {
        let suffix = ".toml"
        return try list(directories.definitions).compactMap { file in
            file.hasSuffix(suffix) ? try? MachineName(String(file.dropLast(suffix.count))) : nil
        }.sorted()
    }

    /// The files of a machine.
    /// - Throws: `notDefined`.
    public func files(of name: MachineName) throws(InventoryError) -> MachineFiles {
        let files = MachineFiles(name, directories)
        guard fileStatus(ofPath: files.definition) != nil else { throw .notDefined(name) }
        return files
    }

    /// Reads a machine's definition.
    /// - Throws: `notDefined`, `badDefinition`, `system`.
    public func definition(of name: MachineName) throws(InventoryError) -> Definition {
        let path = try files(of: name).definition
        let bytes: [UInt8]
        do throws(SystemCallError) { bytes = try readFile(path, limit: DefinitionText.limit) } catch {
            throw .system(purpose: "read", path: path, error)
        }
        return try Self.definition(fromText: bytes, path: path)
    }

    /// Reads a definition from the contents of a file.
    public static func definition(fromText bytes: [UInt8], path: String) throws(InventoryError) -> Definition {
        do throws(DefinitionText.Problem) { return try DefinitionText.parse(String(raw: bytes)) } catch {
            throw .badDefinition(path: path, line: error.line, error.sentence)
        }
    }

    /// Adds a machine. Everything that was made is removed again when `body` fails.
    /// - Parameter body: fills the machine's directory, and returns the definition.
    public func create<Failure: Error>(
        _ name: MachineName, failure: (InventoryError) -> Failure,
        _ body: (MachineFiles) throws(Failure) -> Definition
    ) throws(Failure) {
        let files = MachineFiles(name, directories)
        let locks: UnfinishedLocks
        do throws(InventoryError) { locks = try begin(files) } catch { throw failure(error) }
        do throws(Failure) {
            let definition = try body(files)
            do throws(InventoryError) {
                try write(DefinitionText.text(of: definition), files, replaces: false)
            } catch { throw failure(error) }
        } catch {
            removeTree(files.directory)
            throw error
        }
        removeName(files.unfinished)
        _ = consume locks
    }

    /// Held while a machine's directory is filled. NFS keeps flock(2) of a directory on one host, and that of a file on
    /// the server: the mark's lock tells other hosts that it is not the rest of a process that was killed.
    private struct UnfinishedLocks: ~Copyable {
        let directory: FileLock
        let mark: FileLock
    }

    /// Makes a machine's directory, locked and marked as unfinished.
    private func begin(_ files: MachineFiles) throws(InventoryError) -> UnfinishedLocks {
        try Directories.create(directories.definitions)
        try Directories.create(directories.data)
        guard fileStatus(ofPath: files.definition) == nil else { throw .alreadyDefined(files.name) }
        let lock = try makeDirectory(files)
        // Defined meanwhile, by the one that had the lock.
        guard fileStatus(ofPath: files.definition) == nil else { throw .alreadyDefined(files.name) }
        let isRest = fileStatus(ofPath: files.unfinished) != nil
        if !isRest {
            guard try list(files.directory).isEmpty else {
                throw .dataWithoutDefinition(files.name, directory: files.directory)
            }
        }
        let mark: FileLock
        do throws(SystemCallError) {
            mark = try FileLock(FileDescriptor.open(files.unfinished, O_WRONLY | O_CREAT, mode: 0o600))
        } catch {
            if error.errno == EWOULDBLOCK { throw .busy(files.name) }
            throw .system(purpose: "create", path: files.unfinished, error)
        }
        if isRest { removeContents(files.directory, except: ".unfinished") }
        return UnfinishedLocks(directory: lock, mark: mark)
    }

    /// Makes a machine's directory and locks it. A ``sweep()`` may take an empty one for a rest, and lock or remove it
    /// meanwhile, so a lock has to last a fifth of a second to be another verb's.
    private func makeDirectory(_ files: MachineFiles) throws(InventoryError) -> FileLock {
        var attempts = 0
        while true {
            attempts += 1
            let made = files.directory.withRawCString { unsafe mkdir($0, 0o700) }
            guard made == 0 || errno == EEXIST else {
                throw .system(purpose: "create the directory", path: files.directory, .last("mkdir"))
            }
            do throws(InventoryError) {
                let lock = try lock(files)
                if lock.isOf(files.directory) { return lock }
            } catch {
                guard fileStatus(ofPath: files.directory) == nil || error == .busy(files.name), attempts < 20 else {
                    throw error
                }
                usleep(10_000)
            }
        }
    }

    /// Replaces a machine's definition, in one step.
    /// - Parameter before: what it is replaced for.
    /// - Throws: `changedMeanwhile` when it is no longer that.
    public func replaceDefinition(
        of name: MachineName, _ before: [UInt8], by text: [UInt8]
    ) throws(InventoryError) {
        let files = try files(of: name)
        let lock = try lock(files)
        guard (try? readFile(files.definition, limit: DefinitionText.limit)) == before else {
            throw .changedMeanwhile(name)
        }
        // The reader's own words for what is wrong.
        _ = try Self.definition(fromText: text, path: files.definition)
        try write(String(raw: text), files, replaces: true)
        _ = consume lock
    }

    /// Gives a machine that does not run another definition, in one step; its directory stays as it is.
    /// - Parameter body: gets the definition that is replaced, nil if it cannot be read, and returns the new one.
    /// - Throws: `running`, `busy`, `notDefined`.
    public func redefine<Failure: Error>(
        _ name: MachineName, failure: (InventoryError) -> Failure,
        _ body: (MachineFiles, Definition?) throws(Failure) -> Definition
    ) throws(Failure) {
        let lock: FileLock
        do throws(InventoryError) { lock = try lockStopped(name) } catch { throw failure(error) }
        let files = MachineFiles(name, directories)
        let definition = try body(files, try? self.definition(of: name))
        do throws(InventoryError) {
            try write(DefinitionText.text(of: definition), files, replaces: true)
        } catch { throw failure(error) }
        _ = consume lock
    }

    /// Removes a machine that does not run, with everything in its directory.
    public func delete(_ name: MachineName) throws(InventoryError) {
        let files = try files(of: name)
        let lock: FileLock?
        // A machine without a directory of its own has nothing that could be locked.
        if fileStatus(ofPath: files.directory) == nil {
            guard !isBeingRenamed(name) else { throw .busy(name) }
            lock = nil
        } else {
            lock = try self.lock(files)
        }
        try checkIsStopped(files)
        if lock != nil {
            do throws(SystemCallError) {
                _ = try FileDescriptor.open(files.unfinished, O_WRONLY | O_CREAT, mode: 0o600)
            } catch {
                // Deleting makes the room that the mark needs.
                guard error.errno == ENOSPC || error.errno == EDQUOT else {
                    throw .system(purpose: "create", path: files.unfinished, error)
                }
                removeContents(files.directory, except: nil)
            }
        }
        guard files.definition.withRawCString({ unsafe unlink($0) }) == 0 else {
            throw .system(purpose: "remove", path: files.definition, .last("unlink"))
        }
        removeTree(files.runtime)
        removeTree(files.directory)
    }

    /// Locks a machine that is to be started, and makes the directory of its run-time files.
    /// - Throws: `running`, `busy`.
    public func prepareStart(_ name: MachineName) throws(InventoryError) -> StartLock {
        let lock = try lockStopped(name)
        let files = MachineFiles(name, directories)
        try Directories.create(directories.runtime)
        try Directories.create(files.runtime)
        return StartLock(files: files, lock: lock)
    }

    /// Held while a machine is started.
    public struct StartLock: ~Copyable {
        public let files: MachineFiles
        private let lock: FileLock

        fileprivate init(files: MachineFiles, lock: consuming FileLock) {
            self.files = files
            self.lock = lock
        }
    }

    /// Finishes what a killed `rename` has begun.
    /// - Returns: the old and the new names.
    public func finishRenames() -> [(old: MachineName, new: MachineName)] {
        ((try? list(directories.data)) ?? []).compactMap { try? MachineName($0) }.compactMap { name in
            let files = MachineFiles(name, directories)
            guard fileStatus(ofPath: files.renaming) != nil, let lock = try? lock(files) else { return nil }
            let names = try? finishRename(in: files)
            _ = consume lock
            return names
        }
    }

    /// Removes what verbs that were killed have left.
    /// - Returns: the machines whose `create` or `delete` it was.
    public func sweep() -> [MachineName] {
        sweepDefinitions()
        let names = (try? list(directories.data)) ?? []
        return names.compactMap { try? MachineName($0) }.filter { name in
            let files = MachineFiles(name, directories)
            let isDefined = fileStatus(ofPath: files.definition) != nil
            guard fileStatus(ofPath: files.unfinished) != nil else {
                // Before its first file, or after its last one: nothing to speak of.
                if isDefined { removeBegunRecords(files) } else { removeIfEmpty(files) }
                return false
            }
            guard let lock = try? lock(files),
                let mark = try? FileLock(FileDescriptor.open(files.unfinished, O_WRONLY))
            else { return false }
            let isRest = fileStatus(ofPath: files.definition) == nil
            if isRest {
                removeTree(files.runtime)
                removeTree(files.directory)
            } else {
                // It was finished but for this file.
                removeName(files.unfinished)
            }
            _ = consume mark
            _ = consume lock
            return isRest
        }
    }

    /// Who writes a record has the directory locked.
    private func removeBegunRecords(_ files: MachineFiles) {
        let begun = [files.renaming, files.snapshotting].map { $0 + ".new" }
        guard begun.contains(where: { fileStatus(ofPath: $0, followsLinks: false) != nil }), let lock = try? lock(files)
        else { return }
        for path in begun { removeName(path) }
        _ = consume lock
    }

    private func removeIfEmpty(_ files: MachineFiles) {
        guard (try? list(files.directory)) == [], let lock = try? lock(files),
            fileStatus(ofPath: files.definition) == nil
        else { return }
        _ = files.directory.withRawCString { unsafe rmdir($0) }
        _ = consume lock
    }

    /// Removes definitions that were not yet in their place. Who writes one has its machine's directory locked.
    private func sweepDefinitions() {
        for entry in (try? list(directories.definitions)) ?? [] where entry.hasPrefix(".") && entry.hasSuffix(".new") {
            guard let name = try? MachineName(String(entry.dropFirst().dropLast(4))) else { continue }
            let files = MachineFiles(name, directories)
            if fileStatus(ofPath: files.directory) == nil {
                removeName("\(directories.definitions)/\(entry)")
            } else if let lock = try? lock(files) {
                removeName("\(directories.definitions)/\(entry)")
                _ = consume lock
            }
        }
    }

    func checkIsStopped(_ files: MachineFiles) throws(InventoryError) {
        if let process = try files.runningProcess() { throw .running(files.name, process: process.number) }
    }

    /// - Throws: `busy` while another process has it.
    func lock(_ files: MachineFiles) throws(InventoryError) -> FileLock {
        do throws(SystemCallError) {
            return try FileLock(FileDescriptor.open(files.directory, O_RDONLY | O_DIRECTORY | O_NOFOLLOW))
        } catch {
            guard error.errno == EWOULDBLOCK else { throw .system(purpose: "lock", path: files.directory, error) }
            throw .busy(files.name)
        }
    }

    /// Writes a definition in one step.
    func write(_ text: String, _ files: MachineFiles, replaces: Bool) throws(InventoryError) {
        do throws(SystemCallError) {
            try writeFile(
                files.definition, text.rawBytes, replaces: replaces,
                temporary: "\(directories.definitions)/.\(files.name).new")
        } catch { throw .system(purpose: "write", path: files.definition, error) }
    }

    /// What the files in a machine's directory take on the host.
    public func bytes(of files: MachineFiles) -> UInt64 {
        ((try? list(files.directory)) ?? []).reduce(0) { sum, name in
            let status = fileStatus(ofPath: files.directory + "/" + name, followsLinks: false)
            // In units of 512 (stat(2)).
            return sum &+ UInt64(max(0, status?.st_blocks ?? 0)) &* 512
        }
    }

    // MARK: Directories

    /// The names in a directory; none where there is no directory.
    func list(_ path: String) throws(InventoryError) -> [String] {
        do throws(SystemCallError) { return try namesInDirectory(path) } catch {
            guard error.errno == ENOENT else { throw .system(purpose: "read the directory", path: path, error) }
            return []
        }
    }

    /// Removes a directory and everything in it; links are not followed. What cannot be removed stays.
    func removeTree(_ path: String) {
        removeContents(path, except: nil)
        _ = path.withRawCString { unsafe rmdir($0) }
    }

    private func removeContents(_ path: String, except kept: String?) {
        // The mark last: until then a later sweep goes on.
        let names = ((try? list(path)) ?? []).sorted { ($0 == ".unfinished" ? 1 : 0) < ($1 == ".unfinished" ? 1 : 0) }
        for name in names where name != kept {
            let entry = path + "/" + name
            if let status = fileStatus(ofPath: entry, followsLinks: false), status.st_mode & S_IFMT == S_IFDIR {
                removeTree(entry)
            } else {
                removeName(entry)
            }
        }
    }
}
