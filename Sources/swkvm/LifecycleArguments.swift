// SPDX-License-Identifier: Apache-2.0

public import ArgumentParser
public import Devices
public import Machine
internal import Sandbox
public import Virtio

/// `--on-reboot`.
enum RebootArgument: String, ExpressibleByArgument, CaseIterable {
    case restart, exit

    var action: Configuration.OnReboot { self == .restart ? .restart : .exit }
}

/// `--bus`.
extension Configuration.Bus: ExpressibleByArgument {}

/// `--virtqueues`.
extension VirtqueueFormat: ExpressibleByArgument {}

extension DiskErrorPolicy: ExpressibleByArgument {}

extension Sandbox.Policy {
    static let completion: CompletionKind = {
        let parts = Sandbox.Part.allCases.map(\.rawValue)
        let alone = [Sandbox.Mode.off, .report].map(\.rawValue)
        let others = ([Sandbox.Mode.on.rawValue] + parts).map { "\($0)%" + alone.joined(separator: "/") }
        let all = alone + [Sandbox.Mode.on.rawValue] + parts
        return ValueCompletion.list(alone.map { "\($0)%" + all.joined(separator: "/") } + others)
    }()

    /// `--sandbox`.
    init(parsing argument: String) throws {
        guard let policy = Self(rawValue: argument) else {
            let parts = Sandbox.Part.allCases.map(\.rawValue).joined(separator: ", ")
            throw ValidationError("expected off, report, on, or with commas between them on and parts: \(parts)")
        }
        self = policy
    }
}

extension Configuration.Metrics.Format: ExpressibleByArgument {}

/// `--run-as`.
struct RunAsArgument: Equatable {
    let user: Sandbox.User

    init(parsing argument: String) throws {
        guard let user = Sandbox.User(named: argument) else {
            throw ValidationError("expected the name of a user in /etc/passwd, or UID:GID, but not root")
        }
        self.user = user
    }
}

/// `--stop-timeout`.
struct StopTimeoutArgument: Equatable {
    let timeout: Configuration.StopTimeout

    /// A day is more than any guest takes, and fits in every timer.
    private static let maximum = 86_400

    init(parsing argument: String) throws {
        if argument == "none" {
            timeout = .never
        } else if let seconds = Int(argument.hasSuffix("s") ? String(argument.dropLast()) : argument),
            (0...Self.maximum).contains(seconds)
        {
            timeout = .seconds(seconds)
        } else {
            throw ValidationError("expected a number of seconds from 0 to \(Self.maximum), or none")
        }
    }
}
