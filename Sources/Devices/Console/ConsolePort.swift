// SPDX-License-Identifier: Apache-2.0

/// The guest's end of a console, as the host's end sees it: the serial port, or a virtio console.
public protocol ConsolePort: AnyObject, Sendable {
    /// Takes input for the guest, from the front, without waiting.
    /// - Returns: how many bytes. The rest must be offered again when the port has reported that there is room.
    func receive(_ bytes: Span<UInt8>) -> Int

    /// Offers waiting output to the sink once more.
    /// - Returns: whether all of it is gone.
    @discardableResult func flush() -> Bool

    /// Bytes of output that the sink has not accepted yet.
    var pendingOutput: Int { get }
    /// Bytes that the port itself has dropped.
    var droppedOutput: UInt64 { get }
    /// Bytes that the sink has lost.
    var lostOutput: UInt64 { get }
}

/// A terminal's size in characters.
public struct TerminalSize: Equatable, Sendable {
    public var columns: UInt16
    public var rows: UInt16

    public init(columns: UInt16, rows: UInt16) { (self.columns, self.rows) = (columns, rows) }
}
