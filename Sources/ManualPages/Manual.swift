// SPDX-License-Identifier: Apache-2.0

internal import Foundation

/// Writes the manual pages: `swkvm --experimental-dump-help | swkvm-manual DIRECTORY 'November 5, 2026'`.
@main
enum Manual {
    static func main() throws {
        let arguments = CommandLine.arguments
        guard arguments.count == 3 else {
            FileHandle.standardError.write(
                Data("usage: swkvm --experimental-dump-help | swkvm-manual DIRECTORY DATE\n".utf8))
            exit(64)
        }
        for page in try pages(from: FileHandle.standardInput.readDataToEndOfFile(), date: arguments[2]) {
            try Data(page.text.utf8).write(
                to: URL(fileURLWithPath: arguments[1]).appendingPathComponent(page.name + ".1"))
        }
    }

    /// - Parameters:
    ///   - description: what `--experimental-dump-help` prints.
    static func pages(from description: Data, date: String) throws -> [Page] {
        Page.all(try JSONDecoder().decode(CommandDescription.Dump.self, from: description).command, date: date)
    }
}
