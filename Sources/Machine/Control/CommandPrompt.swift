// SPDX-License-Identifier: Apache-2.0

/// The one-line prompt for swkvm's commands at the terminal: what keys do to its line, and what the terminal shows of
/// them.
struct CommandPrompt {
    /// What became of the line.
    enum Outcome: Equatable {
        /// More keys are needed.
        case open
        case entered(String)
        case cancelled
    }

    static let prompt = "\r\n(swkvm) "
    /// Bytes of a line.
    static let limit = 256

    private var line: [UInt8] = []
    private(set) var isActive = false
    /// What the terminal is to show, until it is taken.
    private var echo: [UInt8] = []

    mutating func open() {
        isActive = true
        line = []
        echo += Array(Self.prompt.utf8)
    }

    /// Takes keys off the front of `keys`, up to the end of the line.
    mutating func take(_ keys: inout ArraySlice<UInt8>) -> Outcome {
        while let key = keys.popFirst() {
            switch key {
            case 0x0d, 0x0a: return close(.entered(String(decoding: line, as: UTF8.self)))
            // Ctrl-C, Ctrl-G and Escape, whose further bytes, of an arrow key, belong to it.
            case 0x03, 0x07: return close(.cancelled)
            case 0x1b:
                keys = []
                return close(.cancelled)
            case 0x7f, 0x08: erase()
            // Ctrl-U
            case 0x15: while !line.isEmpty { erase() }
            case 0x20...: append(key)
            default: break
            }
        }
        return .open
    }

    mutating func takeEcho() -> [UInt8] {
        defer { echo = [] }
        return echo
    }

    private mutating func append(_ key: UInt8) {
        guard line.count < Self.limit else { return }
        line.append(key)
        echo.append(key)
    }

    /// Removes the last character, all bytes of it.
    private mutating func erase() {
        guard var last = line.popLast() else { return }
        while last & 0xc0 == 0x80, let before = line.popLast() { last = before }
        echo += Array("\u{8} \u{8}".utf8)
    }

    private mutating func close(_ outcome: Outcome) -> Outcome {
        isActive = false
        line = []
        echo += Array("\r\n".utf8)
        return outcome
    }
}
