// SPDX-License-Identifier: Apache-2.0

import Testing

/// Tests of `swkvm image` as its users meet it: what it prints, how it ends, and what it leaves behind. Each has a
/// directory with a raw image, `disk.raw`.
protocol ImageCommandSuite {
    var directory: TemporaryDirectory { get }
}

extension ImageCommandSuite {
    static func makeDirectory() throws -> TemporaryDirectory {
        let directory = try TemporaryDirectory()
        try shell(
            """
            cd '\(directory.path)'
            head -c 3000000 /dev/urandom >random
            truncate -s 8M disk.raw
            dd if=random of=disk.raw bs=64k seek=16 conv=notrunc status=none
            rm random
            """)
        return directory
    }

    /// Runs a verb in the directory.
    func image(_ arguments: String, limits: String = "") throws -> (status: Program.End, output: String, errors: String)
    {
        let program = try Program([
            "sh", "-c", "cd '\(directory.path)' && \(limits) exec '\(Host.swkvm)' image \(arguments)",
        ])
        return (try program.waitForEnd(), program.output.text, program.errors.text)
    }

    /// Expects one line on standard error that contains `sentence`, and no file created or removed.
    func expectRefused(
        _ arguments: String, _ sentence: String, status: Int32 = 1, limits: String = "",
        sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let before = try directory.contents
        let result = try image(arguments, limits: limits)
        #expect(result.status == .status(status), "\(result)", sourceLocation: sourceLocation)
        #expect(
            result.errors.hasPrefix("swkvm: ") && (sentence.isEmpty || result.errors.contains(sentence)), "\(result)",
            sourceLocation: sourceLocation)
        #expect(result.errors.split(separator: "\n").count == 1, "\(result)", sourceLocation: sourceLocation)
        #expect(try directory.contents == before, sourceLocation: sourceLocation)
    }
}
