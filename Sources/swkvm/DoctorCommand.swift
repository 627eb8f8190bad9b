internal import ArgumentParser
internal import Machine

/// `swkvm doctor`: what this host can do.
struct DoctorCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "doctor",
        abstract: "Say what this host can do, what is missing, and the command that mends it.",
        discussion: "Ends with status 0 when a machine can run here, and with 1 when something that every machine needs is missing.")

    func run() throws {
        let findings = Doctor.examine()
        for finding in findings { print(finding.description) }
        if findings.contains(where: { $0.kind == .missing }) { throw ExitCode(1) }
    }
}
