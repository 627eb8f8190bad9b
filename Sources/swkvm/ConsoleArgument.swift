// SPDX-License-Identifier: Apache-2.0

internal import Devices
internal import Inventory
internal import Linux
internal import Machine

/// `--console KIND[,…]`.
struct ConsoleArgument {
    static let completion = ValueCompletion.one(
        of: ["stdio", "none", "pty", "unix+@file", "file+@file"],
        then: [
            "log=@file%stdio/none/pty/file", "size=%stdio/none/pty", "keep=%stdio/none/pty", "bps=%none",
            "bps-burst=%none", "device=serial/virtio%none",
        ])

    let kind: Configuration.ConsoleKind
    private(set) var limits = Configuration.ConsoleLimits.none
    /// The guest's end.
    private(set) var device = Configuration.ConsoleDeviceKind.serial

    init(kind: Configuration.ConsoleKind) { self.kind = kind }

    init(parsing argument: String) throws {
        var list = OptionList(argument)
        let first = list.takeFirst()
        switch first {
        case "stdio": kind = .stdio
        case "none": kind = .none
        case "pty": kind = .pty
        default:
            if let path = first.path(after: "unix:") {
                kind = .unix(path)
            } else if let path = first.path(after: "file:") {
                kind = .file(path)
            } else {
                throw ArgumentProblem("expected stdio, none, pty, unix:PATH or file:PATH")
            }
        }
        try parseLimits(list.unique())
    }

    /// Files of older output, unless `keep=` says otherwise.
    private static let standardBackups = 3
    private static let possibleBackups = 1...16
    private static let leastSize: UInt64 = 64 << 10

    private mutating func parseLimits(_ items: [(key: String, value: String?)]) throws {
        var output = LimitWords(operations: nil)
        var size: UInt64?
        var backups: Int?
        for (key, value) in items {
            if try output.take(key, value) { continue }
            switch (key, value) {
            case ("device", let value?):
                guard let device = Configuration.ConsoleDeviceKind(rawValue: value) else {
                    throw ArgumentProblem("device=\(value) is not valid; expected serial or virtio")
                }
                guard kind != .none else { throw ArgumentProblem("device= requires a console: none has no device") }
                self.device = device
            case ("log", let value?):
                guard case .unix = kind else {
                    throw ArgumentProblem("log= requires a socket; expected unix:PATH,log=PATH")
                }
                guard !value.isEmpty else { throw ArgumentProblem("log= requires a path") }
                limits.log = value
            case ("size", let value?):
                guard let number = ByteSize(argument: value)?.bytes, (Self.leastSize...1 << 40).contains(number) else {
                    throw ArgumentProblem("size=\(value) is not the size of a file; expected 64K to 1T, such as 10M")
                }
                size = number
            case ("keep", let value?):
                guard let number = Int(value), Self.possibleBackups.contains(number) else {
                    throw ArgumentProblem(
                        "keep=\(value) is not valid; expected a number of files from \(Self.possibleBackups.lowerBound) to \(Self.possibleBackups.upperBound)"
                    )
                }
                backups = number
            default:
                throw ArgumentProblem(
                    "'\(key)\(value.map { "=" + $0 } ?? "")' is not recognized; expected device=, log=, size=, keep=, bps= or bps-burst= (a comma in a path is written twice)"
                )
            }
        }
        guard size != nil || backups == nil else { throw ArgumentProblem("keep= requires size=") }
        if let size {
            var isFile = limits.log != nil
            if case .file = kind { isFile = true }
            guard isFile else { throw ArgumentProblem("size= requires file:PATH, or log=PATH") }
            limits.file = .init(size: size, backups: backups ?? Self.standardBackups)
        }
        limits.output = try output.limit().bytes
        guard limits.output == nil || kind != .none else {
            throw ArgumentProblem("bps= requires a console: none has no output")
        }
    }
}
