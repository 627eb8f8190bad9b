// SPDX-License-Identifier: Apache-2.0

/// The measured values of one figure, at least twenty.
struct Sample {
    /// In the order in which they were measured.
    let values: [Double]
    private let sorted: [Double]

    init(_ values: [Double]) {
        self.values = values
        sorted = values.sorted()
    }

    var count: Int { sorted.count }
    var median: Double { quantile(0.5) }
    /// Half of the values lie in this range: the spread.
    var middleHalf: (low: Double, high: Double) { (quantile(0.25), quantile(0.75)) }

    private func quantile(_ share: Double) -> Double {
        guard let last = sorted.indices.last else { return .nan }
        let place = share * Double(last)
        let below = Int(place)
        let above = min(below + 1, last)
        return sorted[below] + (sorted[above] - sorted[below]) * (place - Double(below))
    }

    /// The ratios of the runs.
    static func differences(_ first: [Double], _ second: [Double]) -> Sample {
        Sample(zip(first, second).map { $0 - $1 })
    }
}

/// A line of the table: a figure of swkvm's, and that of a peer or of a minimal program.
struct Row {
    enum Goal {
        case atMost(Double)
        case atLeast(Double)
    }

    let name: String
    let unit: String
    let ours: Sample
    var peer: (name: String, sample: Sample)?
    /// The target of the ratio, or of the figure itself if there is no peer.
    var goal: Goal?

    /// The median of the rounds' ratios: the two runs of a round follow each other, so that a host that is slower for
    /// a while is slower for both.
    private var ratio: Double? { peer.map { Sample(zip(ours.values, $0.sample.values).map { $0 / $1 }).median } }

    /// Columns of the table.
    static let titles = [
        "figure", "unit", "n", "swkvm (middle half)", "compared with", "its value (middle half)", "ratio", "target",
        "reached",
    ]

    var columns: [String] {
        var columns = [name, unit, String(ours.count), Self.text(ours)]
        columns += peer.map { [$0.name, Self.text($0.sample)] } ?? ["", ""]
        columns.append(ratio.map(Self.number) ?? "")
        let value = ratio ?? ours.median
        switch goal {
        case .atMost(let limit): columns += ["≤ \(Self.number(limit))", value <= limit ? "yes" : "NO"]
        case .atLeast(let limit): columns += ["≥ \(Self.number(limit))", value >= limit ? "yes" : "NO"]
        case nil: columns += ["", ""]
        }
        return columns
    }

    private static func text(_ sample: Sample) -> String {
        let (low, high) = sample.middleHalf
        return sample.count > 1 ? "\(number(sample.median)) (\(number(low)) – \(number(high)))" : number(sample.median)
    }

    /// About three significant digits.
    static func number(_ value: Double) -> String {
        guard value.isFinite else { return "–" }
        let digits = abs(value) >= 99.95 ? 0 : abs(value) >= 9.995 ? 1 : abs(value) >= 0.0995 ? 2 : 3
        let scale = [1.0, 10, 100, 1000][digits]
        let scaled = Int((abs(value) * scale).rounded())
        let whole = String(scaled / Int(scale))
        let sign = value < 0 && scaled != 0 ? "-" : ""
        if digits == 0 { return sign + whole }
        let rest = String(scaled % Int(scale))
        return sign + whole + "." + String(repeating: "0", count: digits - rest.count) + rest
    }
}

/// Prints rows as a Markdown table.
func printTable(_ rows: [Row]) { printTable([Row.titles] + rows.map(\.columns)) }

/// Prints lines, of which the first has the titles, as a Markdown table.
func printTable(_ lines: [[String]]) {
    let widths = lines[0].indices.map { column in lines.map { $0[column].count }.max() ?? 0 }
    func line(_ cells: [String]) -> String {
        "| " + zip(cells, widths).map { $0 + String(repeating: " ", count: $1 - $0.count) }.joined(separator: " | ")
            + " |"
    }
    print(line(lines[0]))
    print(line(widths.map { String(repeating: "-", count: $0) }))
    for cells in lines.dropFirst() { print(line(cells)) }
}
