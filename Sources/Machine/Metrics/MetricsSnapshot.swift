// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// The figures of a machine at one moment, and their two forms.
struct MetricsSnapshot: Sendable {
    enum Value: Sendable, Equatable {
        case whole(UInt64)
        case decimal(Double)
        /// One figure for each value of the metric's label.
        case byLabel([(name: String, value: UInt64)])

        static func == (left: Value, right: Value) -> Bool {
            switch (left, right) {
            case (.whole(let left), .whole(let right)): left == right
            case (.decimal(let left), .decimal(let right)): left == right
            case (.byLabel(let left), .byLabel(let right)): left.elementsEqual(right) { $0 == $1 }
            default: false
            }
        }
    }

    /// The figures of one thing. A figure that is not known is left out.
    struct Group: Sendable {
        let scope: Metric.Scope
        /// The labels that distinguish several of a kind: `device`, `vcpu`; `device` and `file`.
        var labels: [(name: String, value: String)] = []
        var values: [String: Value] = [:]
    }

    /// Why it was made: `interval`, `signal` or `end`.
    let reason: String
    let time: String
    /// The machine's name.
    let machine: String
    var groups: [Group]

    private func groups(_ scope: Metric.Scope) -> [Group] { groups.filter { $0.scope == scope } }

    // MARK: JSON

    /// One line with its newline.
    var json: String {
        var members: [(String, JSON?)] = [
            ("time", .string(time)), ("reason", .string(reason)), ("name", .string(machine.printable)),
        ]
        for scope in [Metric.Scope.machine, .memory, .process] {
            for group in groups(scope) { members.append((scope.rawValue, .object(fields(group)))) }
        }
        members.append(("vcpus", .array(groups(.vcpu).map { .object(labels($0.labels) + fields($0)) })))
        let devices = groups(.device).map { device -> JSON in
            func parts(_ scope: Metric.Scope) -> [Group] {
                groups(scope).filter { $0.labels.first?.value == device.labels.first?.value }
            }
            var members = labels(device.labels) + fields(device)
            for scope in [Metric.Scope.block, .nbd, .network, .balloon, .console, .vsock] {
                for group in parts(scope) { members.append((scope.rawValue, .object(fields(group)))) }
            }
            let images = parts(.image)
            if !images.isEmpty {
                members.append(
                    ("images", .array(images.map { .object(labels($0.labels.dropFirst()) + fields($0)) })))
            }
            return .object(members)
        }
        members.append(("devices", .array(devices)))
        return JSON.object(members).compact + "\n"
    }

    private func labels(_ labels: some Sequence<(name: String, value: String)>) -> [(String, JSON?)] {
        labels.map { ($0.name, UInt64($0.value).map(JSON.number) ?? .string($0.value)) }
    }

    private func fields(_ group: Group) -> [(String, JSON?)] {
        Metric.all.filter { $0.scope == group.scope }.map { metric in
            let value: JSON? = group.values[metric.field].map { value in
                switch value {
                case .whole(let number): .number(number)
                case .decimal(let number): .decimal(number)
                case .byLabel(let parts): .object(parts.map { ($0.name, .number($0.value)) })
                }
            }
            return (metric.field, value)
        }
    }

    // MARK: Prometheus

    /// The text format of Prometheus (exposition format 0.0.4).
    var prometheus: String {
        var text = ""
        for metric in Metric.all {
            var samples = ""
            for group in groups(metric.scope) {
                let labels = [("machine", machine.printable)] + group.labels.map { ($0.name, $0.value) }
                switch group.values[metric.field] {
                case .whole(let number): samples += Self.sample(metric, labels, "\(number)")
                case .decimal(let number): samples += Self.sample(metric, labels, JSON.decimal(number).compact)
                case .byLabel(let parts):
                    for part in parts {
                        samples += Self.sample(metric, labels + [(metric.label ?? "", part.name)], "\(part.value)")
                    }
                case nil: break
                }
            }
            guard !samples.isEmpty else { continue }
            text += "# HELP \(metric.name) \(metric.help)\n# TYPE \(metric.name) \(metric.kind.rawValue)\n\(samples)"
        }
        return text
    }

    private static func sample(_ metric: Metric, _ labels: [(String, String)], _ value: String) -> String {
        "\(metric.name){" + labels.map { "\($0)=\"\(escaped($1))\"" }.joined(separator: ",") + "} \(value)\n"
    }

    private static func escaped(_ text: String) -> String {
        text.reduce(into: "") { escaped, character in
            switch character {
            case "\\": escaped += "\\\\"
            case "\"": escaped += "\\\""
            case "\n": escaped += "\\n"
            default: escaped.append(character)
            }
        }
    }
}
