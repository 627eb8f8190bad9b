// SPDX-License-Identifier: Apache-2.0

import FoundationEssentials
import Glibc

/// A figure as it is written to a file of results, one JSON object a line, and read from it.
///
/// A table of a run, as printed or in docs/results, can be read too; each of its medians then counts as one value.
struct Figure: Codable {
    let figure: String
    let unit: String
    /// In the order in which they were measured.
    var values: [Double]
    /// The program or limit that it was compared with, and its values.
    let peer: String?
    var peerValues: [Double]?

    init(_ row: Row) {
        figure = row.name
        unit = row.unit
        values = row.ours.values
        peer = row.peer?.name
        peerValues = row.peer?.sample.values
    }

    /// A line of a printed table.
    /// - Returns: `nil` for titles, rules and everything else.
    init?(tableLine line: Substring) {
        let cells = line.split(separator: "|", omittingEmptySubsequences: false).map { cell in
            String(cell.drop { $0 == " " }.reversed().drop { $0 == " " }.reversed())
        }
        // The text before the first bar and after the last one is empty.
        guard cells.count == Row.titles.count + 2, let median = Self.median(cells[4]) else { return nil }
        figure = cells[1]
        unit = cells[2]
        values = [median]
        peer = cells[5].isEmpty ? nil : cells[5]
        peerValues = Self.median(cells[6]).map { [$0] }
    }

    /// The number at the start of a cell such as `5.34 (5.12 – 5.50)`.
    private static func median(_ cell: String) -> Double? { cell.split(separator: " ").first.flatMap { Double($0) } }

    /// Whether a smaller value is better: times and sizes, but not rates.
    var smallerIsBetter: Bool { !unit.hasSuffix("/s") }

    private var key: [String] { [figure, unit, peer ?? ""] }

    /// Appends a run's figures to a file.
    static func append(_ rows: [Row], to path: String) throws {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
        let file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0o644)
        guard file >= 0 else { throw BenchError("cannot write \(path)") }
        defer { close(file) }
        for row in rows {
            let line = Array(try encoder.encode(Figure(row))) + [UInt8(ascii: "\n")]
            guard line.withUnsafeBytes({ write(file, $0.baseAddress, $0.count) }) == line.count else {
                throw BenchError("cannot write \(path)")
            }
        }
    }

    /// The figures of a file, in the order of their first appearance; several runs of one figure are one.
    static func read(_ path: String) throws -> [Figure] {
        var figures: [Figure] = []
        var places: [[String]: Int] = [:]
        for line in String(decoding: try readFile(path), as: UTF8.self).split(separator: "\n") {
            let new: Figure?
            if line.hasPrefix("{") {
                do { new = try JSONDecoder().decode(Figure.self, from: Data(line.utf8)) } catch {
                    throw BenchError("\(path): not a figure: \(line.prefix(80))")
                }
            } else {
                new = Figure(tableLine: line)
            }
            guard let new else { continue }
            if let place = places[new.key] {
                figures[place].values += new.values
                if let more = new.peerValues { figures[place].peerValues = (figures[place].peerValues ?? []) + more }
            } else {
                places[new.key] = figures.count
                figures.append(new)
            }
        }
        guard !figures.isEmpty else { throw BenchError("\(path) has no figures") }
        return figures
    }

    /// `new` over `old`: the median of the ratios of runs that follow each other if there are as many of both, else the
    /// ratio of the medians.
    private static func ratio(_ new: [Double], _ old: [Double]) -> Double {
        new.count == old.count
            ? Sample(zip(new, old).map { $0 / $1 }).median : Sample(new).median / Sample(old).median
    }

    /// Prints each figure that both files have, with the ratio of new to old.
    ///
    /// *Beside the peer* is the ratio of both ratios to the program that was measured in the same run. The time when a
    /// file was written does not matter to it, unless the peer has changed.
    /// - Parameter limit: a figure that is worse by more than this factor is marked, for example 0.97.
    /// - Returns: whether no figure is marked.
    static func compare(_ oldPath: String, _ newPath: String, limit: Double) throws -> Bool {
        let new = Dictionary(uniqueKeysWithValues: try read(newPath).map { ($0.key, $0) })
        var lines: [[String]] = [["figure", "unit", "old", "new", "new ÷ old", "peer", "beside the peer", "gain"]]
        var seen: Set<[String]> = []
        var isGood = true
        for old in try read(oldPath) {
            guard let new = new[old.key] else { continue }
            let ratio = Self.ratio(new.values, old.values)
            var beside: Double?
            if let oldPeer = old.peerValues, let newPeer = new.peerValues {
                beside = ratio / Self.ratio(newPeer, oldPeer)
            }
            let gain = old.smallerIsBetter ? 1 / ratio : ratio
            // A figure appears once for each peer, and is judged once.
            let isFirst = seen.insert([old.figure, old.unit]).inserted
            let isWorse = isFirst && gain < limit
            isGood = isGood && !isWorse
            lines.append([
                old.figure, old.unit, Row.number(Sample(old.values).median), Row.number(Sample(new.values).median),
                Row.number(ratio), old.peer ?? "", beside.map(Row.number) ?? "",
                isFirst ? Row.number(gain) + (isWorse ? " WORSE" : "") : "",
            ])
        }
        guard lines.count > 1 else { throw BenchError("\(oldPath) and \(newPath) have no figure in common") }
        printTable(lines)
        return isGood
    }
}
