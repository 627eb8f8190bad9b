// SPDX-License-Identifier: Apache-2.0

public import ArgumentParser
public import Devices
public import Machine
public import Sandbox
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
extension Sandbox.Mode: ExpressibleByArgument {}
extension Configuration.Metrics.Format: ExpressibleByArgument {}

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
