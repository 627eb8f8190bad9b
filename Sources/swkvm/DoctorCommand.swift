internal import ArgumentParser
internal import Machine

/// `swkvm doctor`: what this host can do.
struct DoctorCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "doctor",
        abstract: "Say what this host can do, what is missing, and the command that mends it.",
        discussion: """
            EXIT STATUS
              0    a machine can run here
              1    something that every machine needs is missing
              64   the command line is wrong
            """)

    func run() throws {
        let findings = Doctor.examine()
        for finding in findings { print(finding.description) }
        if findings.contains(where: { $0.kind == .missing }) { throw ExitCode(1) }
    }
}
