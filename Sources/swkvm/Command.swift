// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import CBuild
internal import CLinux
internal import Glibc
internal import Linux
internal import Sandbox

/// The command line. It parses, calls `Machine`, and prints.
@main
struct Command: ParsableCommand {
    static let version = "0.1.0"

    static let configuration = CommandConfiguration(
        commandName: "swkvm",
        abstract: "A small virtual machine monitor for Linux hosts, on /dev/kvm.",
        discussion: """
            Boot the bundled guest with 2 GiB of RAM:

                swkvm run --mem 2G

            Create, convert and inspect disk images:

                swkvm image create disk.qcow2 20G
                swkvm image convert disk.qcow2 disk.raw
                swkvm image info disk.qcow2

            Check this host, and show the command that fixes each problem:

                swkvm doctor

            `swkvm --version --verbose` adds the revision and the packages that the binary is linked with.

            EXIT STATUS
              0       done
              64      the command line is wrong
              70      swkvm itself failed: the address of the fault is printed
              others  see the help of each command
            """,
        version: "swkvm \(version)",
        subcommands: [
            RunCommand.self, CreateCommand.self, StartCommand.self, StopCommand.self, RestartCommand.self,
            ListCommand.self, InfoCommand.self, ConsoleCommand.self, LogsCommand.self, SSHCommand.self,
            EditCommand.self, ResizeMachineCommand.self, MachineSnapshotCommand.self, CloneCommand.self,
            RenameCommand.self, CopyCommand.self, AutostartCommand.self, DefineCommand.self, DumpXMLCommand.self,
            DeleteCommand.self, IPCommand.self, NetworkCommand.self, ImageCommand.self, DoctorCommand.self,
        ])

    static func main() {
        Sandbox.reportFaults()
        // A file grown to the process's limit (`ulimit -f`) is an error of the call, with a sentence, in all threads:
        // not the end. A pipe whose reader has gone (`| head`) ends no change of an image half-way.
        _ = SignalSet([SIGXFSZ, SIGPIPE]).block()
        let words = Array(rawArguments().dropFirst())
        if let script = CompletionScript.asked(for: words) {
            print(script)
            end(0)
        }
        if Set(words) == ["--version", "--verbose"] {
            print(verboseVersion(components: recordedComponents))
            end(0)
        }
        do {
            var command = try runAlone(words) ?? parseTree(words)
            try command.run()
            end(0)
        } catch let status as ExitCode {
            // The error was reported where this was thrown.
            end(status.rawValue)
        } catch  where exitCode(for: error) == .validationFailure {
            // One line, like every other error's; the parser lists possible values one below the other.
            StandardError().say(Suggestion.keepingNear(oneLine(refusal(of: words, message(for: error)))))
            exit(withError: ExitCode.validationFailure)
        } catch {
            if exitCode(for: error) == .success, let sentence = ForeignWords.unrequestedHelp(words[...]) {
                StandardError().say(sentence)
                exit(withError: ExitCode.validationFailure)
            }
            // Help that was asked for, which goes to standard output.
            if exitCode(for: error) == .success {
                let text = fullMessage(for: error)
                if !text.isEmpty { print(text) }
                end(0)
            }
            exit(withError: error)
        }
    }

    /// Ends the program, with an error if not all of its output could be written. A reader that has gone has what it
    /// wanted.
    /// - Parameter outputError: the error number of a write that the caller made itself.
    static func end(_ status: Int32, outputError: Int32 = 0) -> Never {
        let flushError = clinux_flush_output()
        let error = outputError != 0 ? outputError : flushError
        guard error != 0, error != EPIPE else { Glibc.exit(status) }
        StandardError().say("standard output cannot be written: \(SystemCallError("write", errno: error).reason)")
        Glibc.exit(status == 0 ? outputFailure : status)
    }

    /// What a program that could not print what it was asked for ends with.
    static let outputFailure: Int32 = 1

    /// What `--version --verbose` prints: the version, then what `make release` recorded.
    static func verboseVersion(components: String) -> String {
        guard !components.isEmpty else {
            return "swkvm \(version)\nthis is not a binary of `make release`, and takes its libraries from the system"
        }
        return "swkvm \(version)\n\(components.hasSuffix("\n") ? String(components.dropLast()) : components)"
    }

    /// The lines that `make release` recorded (Sources/CBuild); empty in other builds.
    private static var recordedComponents: String {
        // A constant of the binary, which ends with a zero.
        unsafe String(cString: cbuild_components())
    }

    /// The parser's message about a command line; where it says that an argument is missing and an option is unknown
    /// besides, the option it is: what was meant by that word may be the argument.
    static func refusal(of words: [String], _ message: String) -> String {
        var words = words, found = message
        // No command has more arguments without a name.
        for _ in 0..<3 where found.hasPrefix("Missing expected argument") {
            words.append("?")
            do { _ = try parseTree(words) } catch { found = self.message(for: error) }
        }
        let negative = ": a value that begins with '-' is taken as an option, and no size or number here is negative"
        if message.hasPrefix("Missing value for ") {
            return words.contains { $0.first == "-" && $0.dropFirst().first?.isNumber == true }
                ? message + negative : message
        }
        guard found.hasPrefix("Unknown option ") else { return message }
        guard let number = found.firstOccurrence(of: "'-")?.upperBound, found[number...].first?.isNumber == true else {
            return found
        }
        return found + negative
    }

    /// The parser's list of values, `  - one`, becomes words; an option that a line begins with stays as it is.
    static func oneLine(_ message: String) -> String {
        message.split(separator: "\n").map { line in
            let text = line.drop { $0 == " " }
            return text.hasPrefix("- ") ? text.dropFirst(2) : text
        }.joined(separator: " ")
    }

    /// The whole command line; options of other programs are reported before the parser takes them for something else.
    private static func parseTree(_ words: [String]) throws -> any ParsableCommand {
        if let problem = ForeignWords.problem(in: words) { throw ValidationError(problem) }
        let translated = try QEMUWords.translated(words)
        if let problem = UnknownCommand.problem(in: translated) { throw ValidationError(problem) }
        return try parseAsRoot(translated)
    }

    /// `swkvm run` without the parser, where its options allow that; nil for everything else.
    private static func runAlone(_ words: [String]) -> RunCommand? {
        words.first == "run" ? RunCommand(directly: words.dropFirst()) : nil
    }
}
