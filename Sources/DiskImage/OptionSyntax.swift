// SPDX-License-Identifier: Apache-2.0

/// The syntax of a disk's options on the command line, for messages that name the option to use.
public enum OptionSyntax: Sendable, Equatable {
    /// By words behind its path: `swkvm run --disk PATH,format=raw`.
    case disk
    /// By options of a verb: `swkvm image info --format raw PATH`.
    case verb(VerbOptions)

    /// What a verb of `swkvm image` has besides `--format`, `--key-file`, `--data-file` and so on.
    public struct VerbOptions: Sendable, Equatable {
        /// Indicates whether it has `--force-share`.
        public var canShare: Bool
        /// What options about the key of another image begin with, as `second` in `--second-key-file`.
        public var otherKey: String?
        /// The same for its data file.
        public var otherDataFile: String?

        public init(canShare: Bool = false, otherKey: String? = nil, otherDataFile: String? = nil) {
            self.canShare = canShare
            self.otherKey = otherKey
            self.otherDataFile = otherDataFile
        }
    }

    /// States a format.
    /// - Parameter option: the verb's option for it.
    func format(_ name: String, option: String) -> String {
        self == .disk ? "format=\(name)" : "\(option) \(name)"
    }

    /// Opens a disk to be written for reading alone, where that can be stated.
    var readOnly: String? { self == .disk ? "add ,ro" : nil }

    /// Does without locks, where that can be stated.
    var unlocked: String? {
        guard case .verb(let options) = self else { return "lock=off" }
        return options.canShare ? "--force-share" : nil
    }

    var writeback: String { self == .disk ? "cache=writeback" : "--cache writeback" }
    var backingDirectory: String { self == .disk ? "backing-dir=DIRECTORY" : "--backing-dir DIRECTORY" }
    var backingAnywhere: String { self == .disk ? "backing=anywhere" : "--backing-anywhere" }

    var dataFile: String {
        guard case .verb(let options) = self else { return "data-file=PATH" }
        return "--data-file PATH" + (options.otherDataFile.map { " (or --\($0)-data-file PATH)" } ?? "")
    }

    var key: String {
        guard case .verb(let options) = self else { return "key-file=PATH or key-fd=N" }
        let other = options.otherKey.map { " (or --\($0)-key-file, --\($0)-key-fd)" } ?? ""
        return "--key-file PATH or --key-fd N\(other)"
    }
}
