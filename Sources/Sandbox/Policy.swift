// SPDX-License-Identifier: Apache-2.0

extension Sandbox {
    /// A layer of the confinement, in the order in which a process enters them.
    public enum Part: String, CaseIterable, Sendable {
        /// Files, interfaces, names and IPC objects of its own, of which there are none.
        case namespaces
        /// Another user than root.
        case user
        /// No capability, also in the bounding set.
        case capabilities
        /// Nothing that has a name: files, ports, other processes.
        case landlock
        /// No system call but those of the list.
        case seccomp

        /// Those of `--sandbox on`.
        public static let standard: [Part] = [.user, .capabilities, .landlock, .seccomp]
    }

    /// What `--sandbox` says: `off`, `report`, or `on` and names of parts, with commas between them. Parts without `on`
    /// are those alone.
    public struct Policy: Equatable, Sendable, RawRepresentable {
        public let mode: Mode
        /// Parts that were asked for by name, which must be supported.
        public let named: [Part]
        /// Indicates whether the standard ones are wanted too, as far as there are any.
        private let isStandard: Bool

        public static let off = Policy(mode: .off, named: [], isStandard: false)
        public static let report = Policy(mode: .report, named: [], isStandard: false)
        public static let on = Policy(mode: .on, named: [], isStandard: true)

        private init(mode: Mode, named: [Part], isStandard: Bool) {
            (self.mode, self.named, self.isStandard) = (mode, named, isStandard)
        }

        public init?(rawValue text: String) {
            switch text {
            case Mode.off.rawValue: self = .off
            case Mode.report.rawValue: self = .report
            default:
                var named: [Part] = [], isStandard = false
                for word in text.split(separator: ",", omittingEmptySubsequences: false) {
                    if word == Mode.on.rawValue, !isStandard {
                        isStandard = true
                    } else if let part = Part(rawValue: String(word)), !named.contains(part) {
                        named.append(part)
                    } else {
                        return nil
                    }
                }
                self.init(mode: .on, named: named, isStandard: isStandard)
            }
        }

        public var rawValue: String {
            let words = (isStandard || mode != .on ? [mode.rawValue] : []) + named.map(\.rawValue)
            return words.joined(separator: ",")
        }

        /// The same with one more part that has to be.
        public func requiring(_ part: Part) -> Policy {
            named.contains(part) ? self : Policy(mode: mode, named: named + [part], isStandard: isStandard)
        }

        public func wants(_ part: Part) -> Bool {
            if mode == .report { return part == .seccomp }
            return named.contains(part) || isStandard && Part.standard.contains(part)
        }

        /// Indicates whether a machine is not to run without it.
        public func requires(_ part: Part) -> Bool { named.contains(part) || mode == .report }
    }
}
