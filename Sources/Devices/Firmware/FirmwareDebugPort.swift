// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// The port 0x402, to which firmware writes messages for developers byte by byte, as to QEMU's `isa-debugcon`.
public final class FirmwareDebugPort: ByteWideDevice {
    /// What a read returns, so that firmware knows that there is a reader.
    static let present: UInt8 = 0xe9
    /// Bytes of a line; a longer one continues in the next.
    static let longestLine = 200
    /// Bytes that are reported in all: enough for the verbose builds of firmware, and a bound for a guest that does not
    /// stop.
    static let limit = 1 << 20

    private struct State {
        var line: [UInt8] = []
        var count = 0
    }

    private let state = Guarded(State())
    private let report: @Sendable (String) -> Void

    /// - Parameter report: gets each line; called by the vCPU thread that writes, must not wait.
    public init(report: @escaping @Sendable (String) -> Void) { self.report = report }

    func readByte(_ offset: UInt16) -> UInt8 { offset == 0 ? Self.present : 0xff }

    func writeByte(_ offset: UInt16, _ value: UInt8) {
        guard offset == 0 else { return }
        let lines = state.withLock { state -> [String] in
            guard state.count < Self.limit else { return [] }
            state.count += 1
            if value != UInt8(ascii: "\n"), value != UInt8(ascii: "\r") { state.line.append(value) }
            let isEnd = state.count == Self.limit
            guard value == UInt8(ascii: "\n") || state.line.count == Self.longestLine || isEnd else { return [] }
            defer { state.line = [] }
            return [String(raw: state.line).printable]
                + (isEnd ? ["the firmware has written \(Self.limit) bytes; the rest is not reported"] : [])
        }
        for line in lines where !line.isEmpty { report(line) }
    }
}
