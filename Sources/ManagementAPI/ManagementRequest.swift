// SPDX-License-Identifier: Apache-2.0

package import Linux

/// What a client asks of a machine.
package enum ManagementRequest: Sendable, Equatable {
    package enum Action: String, Sendable, CaseIterable {
        case flushMetrics = "FlushMetrics"
        case start = "InstanceStart"
        case sendCtrlAltDel = "SendCtrlAltDel"
    }

    package enum State: String, Sendable, CaseIterable {
        case paused = "Paused"
        case resumed = "Resumed"
    }

    case instance
    case version
    case configuration
    case machineSettings
    case setMachine(MachineSettings)
    case changeMachine(MachineSettings)
    case setBoot(BootSettings)
    case setDrive(DriveSettings)
    case setInterface(InterfaceSettings)
    case setEntropy(LimiterSettings?)
    /// The file that the guest's serial port writes to.
    case setSerial(String?)
    case setLogger(LoggerSettings)
    case setMetrics(String)
    case action(Action)
    case setState(State)
    /// Something that swkvm has not: what it is, and whether it is a request for a running machine only.
    case absent(Absent)

    /// What Firecracker has, and swkvm has not.
    package enum Absent: Sendable, Equatable {
        case cpuTemplate, vsock, balloon, balloonChange, metadata, snapshot, snapshotLoad, driveChange, interfaceChange
    }
}

/// A request's answer.
package struct ManagementAnswer: Sendable {
    package var status: Int
    /// nil: no body.
    package var body: JSON?
    /// The client used what Firecracker has deprecated.
    package var isDeprecated = false

    package static let done = ManagementAnswer(status: 204, body: nil)

    package static func value(_ body: JSON) -> ManagementAnswer { ManagementAnswer(status: 200, body: body) }

    package static func fault(_ message: String) -> ManagementAnswer {
        ManagementAnswer(status: 400, body: .object([("fault_message", .string(message))]))
    }

    /// An error of HTTP itself.
    package static func error(_ message: String, status: Int = 400) -> ManagementAnswer {
        ManagementAnswer(status: status, body: .object([("error", .string(message))]))
    }
}

extension ManagementRequest {
    /// Decodes a request. What it refuses changes nothing.
    /// - Parameters:
    ///   - method: `GET`, `PUT` or `PATCH`.
    ///   - target: the path, of which the first segment decides; a query is a part of the name.
    ///   - body: empty for none.
    package init(method: String, target: String, body: [UInt8]) throws(Fault) {
        var path = target[...]
        for scheme in ["http://"] where path.hasPrefix(scheme) {
            let rest = path.dropFirst(scheme.utf8.count)
            path = rest.firstIndex(of: "/").map { rest[$0...] } ?? ""
        }
        var segments = path.drop { $0 == "/" }.split(separator: "/", omittingEmptySubsequences: false)
            .map(String.init)[...]
        if segments.last == "" { segments.removeLast() }
        let first = segments.popFirst() ?? ""
        switch method {
        case "GET": self = try Self.get(first, segments.first, hasBody: !body.isEmpty)
        case "PUT":
            guard !body.isEmpty else { throw Fault("Empty PUT request.") }
            self = try Self.put(first, segments.first, body)
        default:
            guard !body.isEmpty else { throw Fault("Empty PATCH request.") }
            self = try Self.patch(first, segments.first, body)
        }
    }

    private static func unknown(_ method: String, _ name: String) -> Fault {
        Fault("Invalid request method and/or path: \(method) \(name).")
    }

    private static func get(_ name: String, _ next: String?, hasBody: Bool) throws(Fault) -> ManagementRequest {
        guard !hasBody else { throw Fault("GET request cannot have a body.") }
        switch (name, next) {
        case ("", _): return .instance
        case ("version", _): return .version
        case ("vm", "config"?): return .configuration
        case ("machine-config", _): return .machineSettings
        case ("balloon", nil): return .absent(.balloon)
        case ("balloon", "statistics"?): return .absent(.balloonChange)
        case ("mmds", _): return .absent(.metadata)
        default: throw unknown("GET", name)
        }
    }

    private static func put(_ name: String, _ next: String?, _ body: [UInt8]) throws(Fault) -> ManagementRequest {
        switch name {
        case "actions":
            let fields = try Fields(value(body), of: "ActionBody", ["action_type"])
            return .action(try fields.requiredWord("action_type", Action.self))
        case "boot-source": return .setBoot(try BootSettings(value(body)))
        case "machine-config": return .setMachine(try MachineSettings(value(body), isComplete: true))
        case "drives":
            let id = try identifier(next)
            let drive = try DriveSettings(value(body))
            try check(id, drive.id)
            return .setDrive(drive)
        case "network-interfaces":
            let id = try identifier(next)
            let interface = try InterfaceSettings(value(body))
            guard id == interface.id else {
                throw Fault("The id from the path [\(id)] does not match the id from the body [\(interface.id)]!")
            }
            return .setInterface(interface)
        case "entropy": return .setEntropy(try entropy(value(body)))
        case "serial":
            return .setSerial(try Fields(value(body), of: "SerialConfig", ["serial_out_path"]).text("serial_out_path"))
        case "logger": return .setLogger(try LoggerSettings(value(body)))
        case "metrics":
            return .setMetrics(
                try Fields(value(body), of: "MetricsConfig", ["metrics_path"]).requiredText("metrics_path"))
        case "cpu-config": return try absent(.cpuTemplate, body)
        case "vsock": return try absent(.vsock, body)
        case "balloon": return try absent(.balloon, body)
        case "mmds": return try absent(.metadata, body)
        case "snapshot":
            switch next {
            case "create"?: return try absent(.snapshot, body)
            case "load"?: return try absent(.snapshotLoad, body)
            case let other?: throw unknown("PUT", "/snapshot/\(other)")
            case nil: throw Fault("Missing snapshot operation type.")
            }
        default: throw unknown("PUT", name)
        }
    }

    private static func patch(_ name: String, _ next: String?, _ body: [UInt8]) throws(Fault) -> ManagementRequest {
        switch name {
        case "machine-config": return .changeMachine(try MachineSettings(value(body), isComplete: false))
        case "vm": return .setState(try Fields(value(body), of: "Vm", ["state"]).requiredWord("state", State.self))
        case "drives":
            let id = try identifier(next)
            let fields = try Fields(
                value(body), of: "BlockDeviceUpdateConfig", ["drive_id", "path_on_host", "rate_limiter"])
            try check(id, fields.requiredText("drive_id"))
            return .absent(.driveChange)
        case "network-interfaces":
            let id = try identifier(next)
            let fields = try Fields(
                value(body), of: "NetworkInterfaceUpdateConfig", ["iface_id", "rx_rate_limiter", "tx_rate_limiter"])
            try check(id, fields.requiredText("iface_id"))
            return .absent(.interfaceChange)
        case "balloon": return try absent(.balloonChange, body)
        case "mmds": return try absent(.metadata, body)
        default: throw unknown("PATCH", name)
        }
    }

    /// The body is read all the same: one that is no JSON is refused as such.
    private static func absent(_ what: Absent, _ body: [UInt8]) throws(Fault) -> ManagementRequest {
        _ = try value(body)
        return .absent(what)
    }

    static func value(_ body: [UInt8]) throws(Fault) -> JSON {
        do throws(JSONProblem) { return try JSONReader.read(body) } catch { throw .body(error.reason) }
    }

    static func entropy(_ value: JSON) throws(Fault) -> LimiterSettings? {
        try LimiterSettings.optional(Fields(value, of: "EntropyDeviceConfig", ["rate_limiter"]).value("rate_limiter"))
    }

    /// Letters, digits and underscores.
    private static func identifier(_ text: String?) throws(Fault) -> String {
        guard let text, !text.isEmpty else { throw Fault("The ID cannot be empty.") }
        guard text.utf8.allSatisfy({ $0 == UInt8(ascii: "_") || Character(Unicode.Scalar($0)).isASCIIAlphanumeric })
        else { throw Fault("API Resource IDs can only contain alphanumeric characters and underscores.") }
        return text
    }

    private static func check(_ path: String, _ body: String) throws(Fault) {
        guard path == body else { throw Fault("The id from the path does not match the id from the body!") }
    }
}

extension Character {
    fileprivate var isASCIIAlphanumeric: Bool { isASCII && (isLetter || isNumber) }
}
