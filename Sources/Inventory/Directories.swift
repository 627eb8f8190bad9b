// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// Where the machines of a user are.
///
///     for root                     for other users (XDG Base Directory Specification)
///     /etc/swkvm/machines          $XDG_CONFIG_HOME/swkvm/machines    definitions, NAME.toml
///     /var/lib/swkvm/machines      $XDG_DATA_HOME/swkvm/machines      NAME/: disks, logs, host keys
///     /run/swkvm                   $XDG_RUNTIME_DIR/swkvm             NAME/: process file, console
///
/// `SWKVM_HOME` replaces them by three directories below it: `definitions`, `machines` and `run`.
public struct Directories: Equatable, Sendable {
    public let definitions: String
    public let data: String
    public let runtime: String

    public init(definitions: String, data: String, runtime: String) {
        (self.definitions, self.data, self.runtime) = (definitions, data, runtime)
    }

    /// - Parameters:
    ///   - environment: gives the value of a variable. Values that are no absolute paths count as unset.
    ///   - user: the effective user ID.
    /// - Throws: `noHome`.
    public init(user: UInt32, environment: (String) -> String?) throws(InventoryError) {
        func path(_ variable: String) -> String? {
            environment(variable).flatMap { $0.utf8.first == UInt8(ascii: "/") ? $0 : nil }
        }
        if let given = environment("SWKVM_HOME"), !given.isEmpty {
            guard let home = path("SWKVM_HOME") else { throw .noHome }
            self.init(definitions: home + "/definitions", data: home + "/machines", runtime: home + "/run")
            return
        }
        if user == 0 {
            self.init(
                definitions: "/etc/swkvm/machines", data: "/var/lib/swkvm/machines", runtime: "/run/swkvm")
            return
        }
        func below(_ variable: String, _ place: String) throws(InventoryError) -> String {
            if let given = path(variable) { return given }
            guard let home = path("HOME") else { throw .noHome }
            return home + place
        }
        let data = try below("XDG_DATA_HOME", "/.local/share") + "/swkvm"
        // Without a session's directory, beside the data: the lock of the process file tells what is stale.
        self.init(
            definitions: try below("XDG_CONFIG_HOME", "/.config") + "/swkvm/machines", data: data + "/machines",
            runtime: path("XDG_RUNTIME_DIR").map { $0 + "/swkvm" } ?? data + "/run")
    }

    /// Those of this process's user.
    public static func current() throws(InventoryError) -> Directories {
        try Directories(user: geteuid(), environment: environmentVariable)
    }

    /// Checks a directory and those above it, as far as they exist: they are root's or this user's, and others can
    /// write to none, or, as to /tmp, only add to it.
    /// - Throws: `unsafeDirectory`.
    static func check(_ path: String) throws(InventoryError) {
        var prefix = ""
        for part in path.split(separator: "/") {
            prefix += "/" + part
            guard let status = fileStatus(ofPath: prefix) else { return }
            let isOwned = status.st_uid == 0 || status.st_uid == geteuid()
            let isOpen = status.st_mode & 0o022 != 0 && status.st_mode & S_ISVTX == 0
            guard isOwned, !isOpen else { throw .unsafeDirectory(prefix) }
        }
    }

    /// Creates a directory and those above it, for this user alone.
    /// - Throws: `unsafeDirectory` when the last one belongs to somebody else, or others may write to it.
    static func create(_ path: String) throws(InventoryError) {
        var prefix = ""
        for part in path.split(separator: "/") {
            prefix += "/" + part
            let status = prefix.withRawCString { unsafe mkdir($0, 0o700) }
            guard status == 0 || errno == EEXIST || errno == EROFS || errno == EACCES else {
                throw .system(purpose: "create the directory", path: prefix, .last("mkdir"))
            }
        }
        guard let status = fileStatus(ofPath: path) else {
            throw .system(purpose: "create the directory", path: path, .last("mkdir"))
        }
        guard status.st_mode & S_IFMT == S_IFDIR, status.st_uid == geteuid(), status.st_mode & 0o022 == 0 else {
            throw .unsafeDirectory(path)
        }
    }
}
