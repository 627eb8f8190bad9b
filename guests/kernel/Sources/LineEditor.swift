// SPDX-License-Identifier: Apache-2.0

/// The editor of the prompt's line: it takes bytes of a terminal, and returns the edited line and what the terminal is
/// to show.
///
/// Keys other than letters come as escape sequences (ECMA-48 §5.4: CSI, parameters, a final byte; SS3 for some).
/// Unsupported ones are dropped as a whole, so that no part of one gets into the line. The output consists of letters,
/// backspaces and spaces, which every terminal supports.
struct LineEditor {
    static let controlC: UInt8 = 0x03

    private enum Key {
        static let controlA: UInt8 = 0x01, controlB: UInt8 = 0x02, controlD: UInt8 = 0x04, controlE: UInt8 = 0x05,
            controlF: UInt8 = 0x06
        static let backspace: UInt8 = 0x08, controlK: UInt8 = 0x0b, controlN: UInt8 = 0x0e, controlP: UInt8 = 0x10,
            controlU: UInt8 = 0x15
        static let controlW: UInt8 = 0x17, escape: UInt8 = 0x1b, delete: UInt8 = 0x7f
    }

    /// The position of the next byte in an escape sequence.
    private enum Sequence {
        case none, begun, single
        /// After CSI; the first parameter so far, and whether there was another.
        case control(parameter: Int, isFirst: Bool)
    }

    private static let longestLine = 1024
    private static let longestHistory = 64

    private let prompt: Text
    private var line: [UInt8] = []
    /// The position of the next letter, 0 … the line's length.
    private var cursor = 0
    private var sequence = Sequence.none
    private var history: [[UInt8]] = []
    /// The index of the shown line of the history; the history's length for the new line.
    private var place = 0
    /// The new line, while an earlier one is shown.
    private var draft: [UInt8] = []

    init(prompt: Text) { self.prompt = prompt }

    /// Begins a line.
    /// - Returns: what the terminal is to show.
    mutating func begin() -> Text {
        (line, cursor, sequence, place, draft) = ([], 0, .none, history.count, [])
        return prompt
    }

    /// Takes a byte.
    /// - Parameter echo: what the terminal is to show is appended to it.
    /// - Returns: the line, if the byte ends it.
    mutating func take(_ byte: UInt8, echo: inout Text) -> Text? {
        switch sequence {
        case .begun:
            sequence =
                byte == UInt8(ascii: "[")
                ? .control(parameter: 0, isFirst: true) : byte == UInt8(ascii: "O") ? .single : .none
            // The escape key alone: the next byte is a key of its own, unless a sequence begins with it.
            guard case .none = sequence, byte < 0x20 else { return nil }
        case .single:
            sequence = .none
            function(byte, parameter: 0, &echo)
            return nil
        case .control(let parameter, let isFirst):
            switch byte {
            case UInt8(ascii: "0")...UInt8(ascii: "9") where isFirst && parameter < 100:
                sequence = .control(parameter: parameter * 10 + Int(byte - UInt8(ascii: "0")), isFirst: true)
                return nil
            case 0x20..<0x40:
                sequence = .control(parameter: parameter, isFirst: false)
                return nil
            case 0x40..<0x7f:
                sequence = .none
                function(byte, parameter: parameter, &echo)
                return nil
            default: sequence = .none  // incomplete: the byte is a key
            }
        case .none: break
        }
        return key(byte, &echo)
    }

    // MARK: Keys

    private mutating func key(_ byte: UInt8, _ echo: inout Text) -> Text? {
        switch byte {
        case UInt8(ascii: "\r"), UInt8(ascii: "\n"): return end(&echo)
        case Self.controlC:
            echo.append("^C\n")
            echo.append(begin())
        case Key.escape: sequence = .begun
        case Key.backspace, Key.delete: remove(cursor - 1, cursor, &echo)
        case Key.controlD:
            // The end of input, as in shells.
            if line.isEmpty {
                echo.append("exit\n")
                return "exit"
            }
            remove(cursor, cursor + 1, &echo)
        case Key.controlU: remove(0, cursor, &echo)
        case Key.controlK: remove(cursor, line.count, &echo)
        case Key.controlW: remove(startOfWord, cursor, &echo)
        case Key.controlA: move(to: 0, &echo)
        case Key.controlE: move(to: line.count, &echo)
        case Key.controlB: move(to: cursor - 1, &echo)
        case Key.controlF: move(to: cursor + 1, &echo)
        case Key.controlP: recall(place - 1, &echo)
        case Key.controlN: recall(place + 1, &echo)
        case 0x20..<0x7f where line.count < Self.longestLine: insert(byte, &echo)
        default: break
        }
        return nil
    }

    /// Handles a key by its sequence's final byte: those of xterm, and the numbers of a VT220.
    private mutating func function(_ final: UInt8, parameter: Int, _ echo: inout Text) {
        switch (final, parameter) {
        case (UInt8(ascii: "A"), _): recall(place - 1, &echo)
        case (UInt8(ascii: "B"), _): recall(place + 1, &echo)
        case (UInt8(ascii: "C"), _): move(to: cursor + 1, &echo)
        case (UInt8(ascii: "D"), _): move(to: cursor - 1, &echo)
        case (UInt8(ascii: "H"), _), (UInt8(ascii: "~"), 1), (UInt8(ascii: "~"), 7): move(to: 0, &echo)
        case (UInt8(ascii: "F"), _), (UInt8(ascii: "~"), 4), (UInt8(ascii: "~"), 8): move(to: line.count, &echo)
        case (UInt8(ascii: "~"), 3): remove(cursor, cursor + 1, &echo)
        default: break
        }
    }

    /// Where the word before the cursor begins.
    private var startOfWord: Int {
        var start = cursor
        while start > 0, line[start - 1] == UInt8(ascii: " ") { start -= 1 }
        while start > 0, line[start - 1] != UInt8(ascii: " ") { start -= 1 }
        return start
    }

    // MARK: Changes, each drawn from the cursor on

    private mutating func insert(_ byte: UInt8, _ echo: inout Text) {
        line.insert(byte, at: cursor)
        for index in cursor..<line.count { echo.append(line[index]) }
        cursor += 1
        back(line.count - cursor, &echo)
    }

    /// Removes the letters from `start` to `end`, as far as they exist.
    private mutating func remove(_ start: Int, _ end: Int, _ echo: inout Text) {
        let start = max(start, 0), end = min(end, line.count)
        guard start < end else { return }
        move(to: start, &echo)
        line.removeSubrange(start..<end)
        for index in start..<line.count { echo.append(line[index]) }
        for _ in start..<end { echo.append(UInt8(ascii: " ")) }
        back(line.count - start + (end - start), &echo)
    }

    private mutating func move(to target: Int, _ echo: inout Text) {
        let target = min(max(target, 0), line.count)
        if target < cursor {
            back(cursor - target, &echo)
        } else {
            for index in cursor..<target { echo.append(line[index]) }
        }
        cursor = target
    }

    private func back(_ count: Int, _ echo: inout Text) { for _ in 0..<count { echo.append(Key.backspace) } }

    // MARK: History

    /// Shows another line of the history, or the new one behind the last.
    private mutating func recall(_ target: Int, _ echo: inout Text) {
        guard target >= 0, target <= history.count, target != place else { return }
        if place == history.count { draft = line }
        remove(0, line.count, &echo)
        place = target
        line = target == history.count ? draft : history[target]
        move(to: line.count, &echo)
    }

    private mutating func end(_ echo: inout Text) -> Text {
        move(to: line.count, &echo)
        echo.append(UInt8(ascii: "\n"))
        if !line.isEmpty, line != history.last {
            if history.count == Self.longestHistory { history.removeFirst() }
            history.append(line)
        }
        return Text(line)
    }
}
