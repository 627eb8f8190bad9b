// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import CLinux
internal import Glibc
internal import Inventory
internal import Linux

/// A verb on machines that are defined.
protocol MachineVerb: ParsableCommand {}

extension MachineVerb {
    /// The machines of this user, after the rest of verbs that were killed has been removed.
    func inventory() throws -> Inventory {
        let inventory = Inventory(try attempt { () throws(InventoryError) in try Directories.current() })
        try attempt { () throws(InventoryError) in try inventory.checkDirectories() }
        for (old, new) in inventory.finishRenames() {
            StandardError().say("\(old): finished a `rename` to \(new) that was interrupted")
        }
        for name in inventory.sweep() {
            StandardError().say("\(name): removed what a `create` or `delete` that did not finish has left")
        }
        return inventory
    }

    /// The machine that a command line names, and the others.
    func machine(_ text: String) throws -> (inventory: Inventory, files: MachineFiles) {
        let inventory = try inventory()
        let name = try machineName(text)
        return (inventory, try attempt { () throws(InventoryError) in try inventory.files(of: name) })
    }

    func machineName(_ text: String) throws -> MachineName {
        try attempt { () throws(InventoryError) in try MachineName(text) }
    }

    /// Calls the inventory; its error is reported in one line, and ends the program.
    func attempt<Answer: ~Copyable>(_ body: () throws(InventoryError) -> Answer) throws -> Answer {
        do throws(InventoryError) { return try body() } catch {
            StandardError().say(error.description)
            throw error.isUsage ? ExitCode.validationFailure : ExitCode(MachineTool.failure)
        }
    }

    /// Does the same for several machines: an error with one is reported, and the others have their turn.
    /// - Throws: the status of the first that failed.
    func forEach(_ names: [String], _ body: (MachineName) throws -> Void) throws {
        var failure: (any Error)?
        for text in names {
            do { try body(try machineName(text)) } catch { failure = failure ?? error }
        }
        if let failure { throw failure }
    }
}

enum MachineTool {
    /// The status of a verb that could not do what was asked.
    static let failure: Int32 = 1

    static let exitStatuses = exitStatuses(of: "a machine")

    static func exitStatuses(of thing: String) -> String {
        """
        EXIT STATUS
          0    done
          1    it could not be done, for the reason on standard error
          64   the command line is wrong, or names \(thing) that does not exist
        """
    }

    /// Runs a program with this process's standard streams, and waits for it.
    /// - Returns: its exit status, 128 and the signal's number if one ended it; nil if it cannot be started.
    static func run(_ program: String, _ words: [String]) -> Int32? {
        var process: pid_t = 0
        // Signals are blocked here for this program's own reasons; the other one has reasons of its own.
        var attributes = posix_spawnattr_t()
        var none = sigset_t()
        // Three structures of this function, and an array of C strings that it frees.
        return unsafe withCStrings([program] + words) { arguments in
            unsafe posix_spawnattr_init(&attributes)
            unsafe sigemptyset(&none)
            unsafe posix_spawnattr_setsigmask(&attributes, &none)
            unsafe posix_spawnattr_setflags(&attributes, Int16(POSIX_SPAWN_SETSIGMASK))
            defer { unsafe posix_spawnattr_destroy(&attributes) }
            let status = program.withRawCString { path in
                unsafe posix_spawnp(&process, path, nil, &attributes, arguments, environ)
            }
            guard status == 0 else { return nil }
            var ended: Int32 = 0
            while unsafe waitpid(process, &ended, 0) < 0, errno == EINTR {}
            let signal = ended & 0x7f
            return signal == 0 ? (ended >> 8) & 0xff : 128 + signal
        }
    }

    /// Becomes another program; returns only if it cannot be started.
    static func become(_ program: String, _ words: [String]) {
        var none = sigset_t()
        unsafe sigemptyset(&none)
        unsafe sigprocmask(SIG_SETMASK, &none, nil)
        // The strings live until the call, which does not return where they would be freed.
        unsafe withCStrings([program] + words) { arguments in
            _ = program.withRawCString { unsafe execvp($0, arguments) }
        }
    }

    private static func withCStrings<Answer>(
        _ words: [String], _ body: (UnsafePointer<UnsafeMutablePointer<CChar>?>) -> Answer
    ) -> Answer {
        var pointers: [UnsafeMutablePointer<CChar>?] = unsafe words.map { word in
            word.withRawCString { unsafe strdup($0) }
        }
        unsafe pointers.append(nil)
        defer { unsafe pointers.forEach { unsafe free($0) } }
        return unsafe pointers.withUnsafeBufferPointer { unsafe body($0.baseAddress!) }
    }
}
