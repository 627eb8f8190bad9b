// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// A machine's new name.
///
/// A file in the machine's directory says what is being done before anything is, and has all that is needed to finish
/// it: a rename that was killed is finished by the next ``Inventory/sweep()``.
extension Inventory {
    /// Gives a machine that does not run another name.
    /// - Parameter body: returns the definition that it has then.
    public func rename<Failure: Error>(
        _ old: MachineName, to new: MachineName, failure: (InventoryError) -> Failure,
        _ body: (MachineFiles, Definition) throws(Failure) -> Definition
    ) throws(Failure) {
        func inventory<Answer: ~Copyable>(_ body: () throws(InventoryError) -> Answer) throws(Failure) -> Answer {
            do throws(InventoryError) { return try body() } catch { throw failure(error) }
        }
        let target = MachineFiles(new, directories)
        let lock = try inventory { () throws(InventoryError) in
            guard fileStatus(ofPath: target.definition) == nil else { throw .alreadyDefined(new) }
            guard fileStatus(ofPath: target.directory) == nil else {
                throw .dataWithoutDefinition(new, directory: target.directory)
            }
            return try lockStopped(old)
        }
        let before = try inventory { () throws(InventoryError) in try definition(of: old) }
        let after = try body(MachineFiles(old, directories), before)
        try inventory { () throws(InventoryError) in
            try Journal(old: old, new: new, text: DefinitionText.text(of: after)).write(
                to: MachineFiles(old, directories))
            guard try finishRename(in: MachineFiles(old, directories)) != nil else { throw .alreadyDefined(new) }
        }
        _ = consume lock
    }

    /// Finishes the rename of a machine whose directory is locked.
    /// - Parameter files: with the directory that it has now.
    /// - Returns: the names; nil if there was nothing to be done, or the new name is taken by now.
    func finishRename(in files: MachineFiles) throws(InventoryError) -> (old: MachineName, new: MachineName)? {
        guard let journal = Journal(files) else { return nil }
        let old = MachineFiles(journal.old, directories), new = MachineFiles(journal.new, directories)
        if files.name == journal.old {
            guard fileStatus(ofPath: new.definition) == nil, clinux_rename_path(old.directory, new.directory) else {
                removeName(old.renaming)
                return nil
            }
        }
        // The old one is no machine's from here on: its directory is another's.
        guard old.definition.withRawCString({ unsafe unlink($0) }) == 0 || errno == ENOENT else {
            throw .system(purpose: "remove", path: old.definition, .last("unlink"))
        }
        if fileStatus(ofPath: new.definition) == nil { try write(journal.text, new, replaces: false) }
        removeTree(old.runtime)
        removeName(new.renaming)
        return (journal.old, journal.new)
    }

    /// Indicates whether a machine's directory has another name already, and its definition may still be there.
    func isBeingRenamed(_ name: MachineName) -> Bool {
        ((try? list(directories.data)) ?? []).contains { entry in
            guard let new = try? MachineName(entry), new != name else { return false }
            return Journal(MachineFiles(new, directories))?.old == name
        }
    }

    private func clinux_rename_path(_ from: String, _ to: String) -> Bool {
        from.withRawCString { from in to.withRawCString { to in unsafe clinux_rename_new(from, to) == 0 } }
    }

    /// What is in the file: two names, each in a line, and the definition behind them.
    private struct Journal {
        let old: MachineName
        let new: MachineName
        let text: String

        init(old: MachineName, new: MachineName, text: String) { (self.old, self.new, self.text) = (old, new, text) }

        /// nil where there is none, or it is not of this directory.
        init?(_ files: MachineFiles) {
            guard let bytes = try? readFile(files.renaming, limit: 2 << 20) else { return nil }
            let lines = bytes.split(separator: UInt8(ascii: "\n"), maxSplits: 2, omittingEmptySubsequences: false)
            guard lines.count == 3, let old = try? MachineName(String(raw: lines[0])),
                let new = try? MachineName(String(raw: lines[1])), files.name == old || files.name == new
            else { return nil }
            self.init(old: old, new: new, text: String(raw: lines[2]))
        }

        /// Writes it in one step.
        func write(to files: MachineFiles) throws(InventoryError) {
            do throws(SystemCallError) {
                try writeFile(files.renaming, "\(old)\n\(new)\n\(text)".rawBytes)
            } catch { throw .system(purpose: "write", path: files.renaming, error) }
        }
    }
}
