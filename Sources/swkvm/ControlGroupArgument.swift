// SPDX-License-Identifier: Apache-2.0

internal import Inventory
internal import Machine

/// `--cgroup PATH[,…]`.
struct ControlGroupArgument {
    static let completion = ValueCompletion.list(file: true, ["cpu=", "memory=", "io-weight="])

    private(set) var group: Configuration.ControlGroup

    init(parsing argument: String) throws {
        var list = OptionList(argument)
        let path = list.takeFirst()
        guard !path.isEmpty else {
            throw ArgumentProblem("a control group needs a path, such as /sys/fs/cgroup/machines/vm1")
        }
        group = Configuration.ControlGroup(path: path)
        for (key, value) in try list.unique() {
            switch (key, value) {
            case ("cpu", let value?): group.cpu = try Self.quota(value)
            case ("memory", let value?):
                guard let size = ByteSize(argument: value)?.bytes, (Self.leastMemory...1 << 60).contains(size) else {
                    throw ArgumentProblem("memory=\(value) is not a limit of memory; expected a size, 16M or more")
                }
                group.memory = size
            case ("io-weight", let value?):
                guard let weight = Int(value), (1...10_000).contains(weight) else {
                    throw ArgumentProblem("io-weight=\(value) is not a weight; expected 1 to 10000")
                }
                group.ioWeight = weight
            default:
                throw ArgumentProblem(
                    "'\(key)\(value.map { "=" + $0 } ?? "")' is not recognized; expected cpu=, memory= or io-weight="
                )
            }
        }
    }

    /// Less than swkvm itself takes would end it.
    private static let leastMemory: UInt64 = 16 << 20

    /// Microseconds in a tenth of a second, for a number of CPUs with up to two decimal places.
    private static func quota(_ text: String) throws -> UInt64 {
        let parts = text.split(separator: ".", omittingEmptySubsequences: false)
        let problem = ArgumentProblem("cpu=\(text) is not a number of CPUs; expected 0.01 to 4096, such as 1.5")
        func isDigits(_ part: Substring) -> Bool { part.utf8.allSatisfy { (0x30...0x39).contains($0) } }
        guard (1...2).contains(parts.count), parts.allSatisfy({ !$0.isEmpty && isDigits($0) }),
            let whole = UInt64(parts[0]), whole <= 4096
        else { throw problem }
        var hundredths = whole * 100
        if parts.count == 2 {
            guard parts[1].utf8.count <= 2, let digits = UInt64(parts[1]) else { throw problem }
            hundredths += parts[1].utf8.count == 1 ? digits * 10 : digits
        }
        guard (1...409_600).contains(hundredths) else { throw problem }
        return hundredths * 1000
    }
}
