// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import DiskImage
internal import FileSystems
internal import Glibc
internal import HostNetwork
internal import Inventory
internal import Linux

/// `swkvm cp`.
struct CopyCommand: MachineVerb {
    static let configuration = CommandConfiguration(
        commandName: "cp",
        abstract: "Copy files out of a machine, or into it.",
        discussion: """
            One of SOURCE and TARGET is NAME:PATH, with a path in the guest of the machine NAME; the other one is a path here. Directories are copied with what is in them.

            Of a machine that runs, scp(1) copies, as the user and by the port of `swkvm ssh`: a path that does not begin with / is in that user's home directory. \
            Out of one that is stopped, the files are read from its first disk, as `swkvm image cp-out` does; nothing that exists here is replaced \
            then. Nothing can be copied into a stopped machine.

            EXAMPLES
              swkvm cp web:/var/log/syslog .
              swkvm cp site.conf web:/tmp/

            \(MachineTool.exitStatuses)
            """)

    @Argument(help: "The file or directory: NAME:PATH, or a path here.", completion: .file())
    var source: String

    @Argument(help: "Where to: NAME:PATH, or a path here.", completion: .file())
    var target: String

    func validate() throws {
        guard (Place(source) == nil) != (Place(target) == nil) else {
            throw ValidationError(
                "one of SOURCE and TARGET has to be NAME:PATH, and the other one a path here; ./NAME:PATH is a file here"
            )
        }
    }

    func run() throws {
        let inventory = try inventory()
        guard let place = Place(source) ?? Place(target) else { return }
        let name = place.name
        let (files, definition) = try attempt { () throws(InventoryError) in
            (try inventory.files(of: name), try inventory.definition(of: name))
        }
        guard try attempt({ () throws(InventoryError) in try files.runningProcess() != nil }) else {
            return try copyFromDisk(name, place.path, definition, files)
        }
        guard let words = SSHCommand.copyArguments(files, definition) else { throw ExitCode(MachineTool.failure) }
        let guest = "\(words.host):\(place.path)"
        // What looks like an address to scp is a file here.
        func here(_ path: String) -> String { path.utf8.first == UInt8(ascii: "/") ? path : "./" + path }
        let pair = Place(source) != nil ? [guest, here(target)] : [here(source), guest]
        MachineTool.become("scp", words.options + ["-r", "--"] + pair)
        StandardError().say(
            "scp cannot be run: \(SystemCallError.last("execvp").reason); `apt-get install openssh-client` installs it")
        throw ExitCode(MachineTool.failure)
    }

    private func copyFromDisk(
        _ name: MachineName, _ path: String, _ definition: Definition, _ files: MachineFiles
    ) throws {
        func refuse(_ sentence: String) -> ExitCode {
            StandardError().say(sentence)
            return ExitCode(MachineTool.failure)
        }
        guard Place(source) != nil else {
            throw refuse(
                "\(name) is stopped, and files can only be copied into a machine that runs: `swkvm start \(name)`")
        }
        guard path.utf8.first == UInt8(ascii: "/") else {
            throw refuse("\(name) is stopped: a path on its disk begins with /, such as \(name):/etc/hostname")
        }
        let image = try changeDisks(name) { () throws(MachineDiskError) in
            do throws(DiskImageError) {
                guard var disk = try OwnDisk.all(in: definition, files).first.map({ ($0.path, $0.options) }) else {
                    throw .impossible(path: files.directory, reason: "\(name) has no disk of its own there")
                }
                disk.1.readOnly = true
                return ImageSource(ImageContents(try DiskImage(path: disk.0, options: disk.1)))
            } catch { throw .disk(error) }
        }
        do throws(FileSystemError) {
            var extraction = FileExtraction(try DiskContents(image).fileSystem(partition: nil))
            try extraction.copy(path, to: target)
        } catch { throw refuse("\(name): \(error.description.printable)") }
    }

    /// `NAME:PATH`.
    private struct Place {
        let name: MachineName
        let path: String

        /// nil for a path here.
        init?(_ text: String) {
            guard let colon = text.firstIndex(of: ":"), let name = try? MachineName(String(text[..<colon])) else {
                return nil
            }
            self.name = name
            path = String(text[text.index(after: colon)...])
        }
    }
}

extension SSHCommand {
    /// What scp gets in front of its paths, and the guest's name for it; nil where there is none, which was reported.
    static func copyArguments(
        _ files: MachineFiles, _ definition: Definition
    ) -> (options: [String], host: String)? {
        guard var words = arguments(files.name, files, definition) else { return nil }
        let host = words.removeLast()
        var options: [String] = []
        var rest = words[...]
        while let word = rest.popFirst(), let value = rest.popFirst() {
            switch word {
            case "-p": options += ["-P", value]
            case "-l": options += ["-o", "User=\(value)"]
            default: options += [word, value]
            }
        }
        return (options, host.utf8.contains(UInt8(ascii: ":")) ? "[\(host)]" : host)
    }
}
