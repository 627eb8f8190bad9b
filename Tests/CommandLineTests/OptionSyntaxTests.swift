// SPDX-License-Identifier: Apache-2.0

import DiskImage
import Linux
import TestSupport
import Testing

@testable import swkvm

/// Messages about a disk name what the command that was called accepts.
@Suite(.timed) struct OptionSyntaxTests {
    private static let verbs: [(path: String, options: OptionSyntax.VerbOptions)] = [
        ("create", ImageCreateCommand.options), ("info", ImageInfoCommand.options),
        ("check", ImageCheckCommand.options), ("convert", ImageConvertCommand.options),
        ("compare", ImageCompareCommand.options), ("map", ImageMapCommand.options),
        ("resize", ImageResizeCommand.options), ("commit", ImageCommitCommand.options),
        ("ls", ImageListCommand.options), ("cat", ImageCatCommand.options), ("cp-out", ImageCopyOutCommand.options),
        ("rebase", ImageRebaseCommand.options), ("bench", ImageBenchCommand.options),
        ("snapshot list", ImageSnapshotCommand.List.options), ("snapshot create", ImageSnapshotCommand.Create.options),
        ("snapshot apply", ImageSnapshotCommand.Apply.options),
        ("snapshot delete", ImageSnapshotCommand.Delete.options),
        ("snapshot by-option", ImageSnapshotCommand.ByOption.options),
    ]

    /// What a verb is said to have is what the parser accepts.
    @Test func verbsHaveTheOptionsThatMessagesName() throws {
        let commands = try CommandTree.whole().all().filter { $0.path.first == "image" && $0.path.count > 1 }
            .filter { $0.path != ["image", "snapshot"] }
        #expect(Set(commands.map { $0.path.dropFirst().joined(separator: " ") }) == Set(Self.verbs.map(\.path)))
        for (path, command) in commands {
            let verb = path.dropFirst().joined(separator: " ")
            let names = (command.arguments ?? []).flatMap { ($0.names ?? []).map(\.spelling) }
            let options = try #require(Self.verbs.first { $0.path == verb }).options
            #expect(names.contains("--force-share") == options.canShare, "\(verb)")
            let keys = names.filter { $0.hasSuffix("-key-file") && !["--key-file", "--target-key-file"].contains($0) }
            #expect(keys == (options.otherKey.map { ["--\($0)-key-file"] } ?? []), "\(verb)")
            let data = names.filter { $0.hasSuffix("-data-file") && $0 != "--data-file" }
            #expect(data == (options.otherDataFile.map { ["--\($0)-data-file"] } ?? []), "\(verb)")
        }
    }

    private static let errors: [(DiskImageError, disk: String, verb: String)] = [
        (
            .formatUnknown(path: "d"), "specify format=raw, format=qcow2 …", "specify --format raw, --format qcow2 …"
        ),
        (.notWritable(path: "d", reason: "why"), "for writing: why; or add ,ro", "for writing: why"),
        (.locked(path: "d", forWriting: false), "end that process or add ,ro", "end that process"),
        (
            .lockingUnavailable(path: "d", SystemCallError("fcntl", errno: 11)),
            "; lock=off disables locking, at your own risk", "; --force-share disables locking, at your own risk"
        ),
        (
            .directUnavailable(path: "d", SystemCallError("open", errno: 22)), "; use cache=writeback",
            "; use --cache writeback"
        ),
        (
            .outside(path: "d"), "; backing-dir=DIRECTORY allows another directory, backing=anywhere allows all",
            "; --backing-dir DIRECTORY allows another directory, --backing-anywhere allows all"
        ),
        (.addressNotStated(path: "d"), "; backing=anywhere allows it", "; --backing-anywhere allows it"),
        (
            .dataFileNotAllowed(path: "d", name: "n"), "; specify data-file=PATH to use it",
            "; specify --data-file PATH (or --second-data-file PATH) to use it"
        ),
        (
            .keyMissing(path: "d", method: "LUKS"), ": specify key-file=PATH or key-fd=N",
            ": specify --key-file PATH or --key-fd N (or --second-key-file, --second-key-fd)"
        ),
        (.remoteUnchecked(path: "d"), "; format=raw skips this check", "; --format raw skips this check"),
    ]

    /// Also where the file is below the one that the user named.
    @Test func messages() {
        let verb = OptionSyntax.verb(ImageCompareCommand.options)
        for (error, disk, option) in Self.errors {
            for error in [
                error, .backing(of: "o", error), .extent(of: "o", error), .dataFile(of: "o", error),
                .backing(of: "p", .backing(of: "o", error)),
            ] {
                #expect("\(error)".hasSuffix(disk), "\(error)")
                #expect(error.text(verb).hasSuffix(option), "\(error.text(verb))")
            }
        }
        let few = OptionSyntax.verb(OptionSyntax.VerbOptions())
        #expect(
            DiskImageError.keyMissing(path: "d", method: "LUKS").text(few).hasSuffix(
                ": specify --key-file PATH or --key-fd N"))
        #expect(
            DiskImageError.lockingUnavailable(path: "d", SystemCallError("fcntl", errno: 11)).text(few)
                == "disk \"d\": its file system does not support locks (\(SystemCallError("fcntl", errno: 11)))")
    }
}
