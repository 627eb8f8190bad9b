// SPDX-License-Identifier: Apache-2.0

internal import Devices
internal import KVM

/// The ports of the 8254 timer until a guest first uses them; from then on KVM answers them and nothing comes here.
final class TimerPorts: PortDevice {
    private let timer: IntervalTimer
    private let first: UInt16

    /// - Parameter first: the port that offsets count from.
    init(_ timer: IntervalTimer, first: UInt16) {
        self.timer = timer
        self.first = first
    }

    func read(_ offset: UInt16, size: Int) -> UInt32 { UInt32(timer.read(port: first &+ offset)) }

    func write(_ offset: UInt16, size: Int, value: UInt32) {
        timer.write(port: first &+ offset, value: UInt8(truncatingIfNeeded: value))
    }
}
