// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import Linux
internal import Machine

/// `swkvm doctor`: what this host can do.
struct DoctorCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "doctor",
        abstract: "Check whether this host can run machines, and show the command that fixes each problem.",
        discussion: """
            EXIT STATUS
              0    a machine can run here
              1    a requirement of every machine is missing
              64   the command line is wrong
            """)

    @Flag(help: "Print JSON: whether machines can run, the findings, and the commands that fix them.")
    var json = false

    func run() throws {
        let findings = Doctor.examine()
        if json { print(Self.json(findings)) } else { for finding in findings { print(finding.description) } }
        if findings.contains(where: { $0.kind == .missing }) { throw ExitCode(1) }
    }

    static func json(_ findings: [Doctor.Finding]) -> JSON {
        .object([
            ("usable", .bool(!findings.contains { $0.kind == .missing })),
            (
                "findings",
                .array(
                    findings.map { finding in
                        .object([
                            ("kind", .string(finding.kind.rawValue.lowercased())),
                            ("subject", .string(finding.subject)), ("text", .string(finding.text)),
                            ("commands", .array(finding.remedy?.commands.map { .string($0) } ?? [])),
                            ("advice", finding.remedy?.advice.map { .string($0) }),
                        ])
                    })
            ),
        ])
    }
}
