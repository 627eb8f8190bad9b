// SPDX-License-Identifier: Apache-2.0

internal import Devices
internal import GuestMemory

/// Requests about the balloon.
extension ControlService {
    func setBalloon(_ target: UInt64) throws(MachineControlError) -> String {
        let device = try control.balloonDevice()
        try control.checkBalloon(target: target)
        device.setTarget(target)
        return "the guest is asked to give up \(byteText(target)) (\(byteText(device.statistics.actual)) now)"
    }

    func setBalloonInterval(_ seconds: UInt32) throws(MachineControlError) -> String {
        let device = try control.balloonDevice()
        guard (1...BalloonSettings.maximumInterval).contains(seconds) else {
            throw .refused("the interval of statistics is 1 to \(BalloonSettings.maximumInterval) seconds")
        }
        guard device.setStatisticsInterval(seconds) else {
            throw .refused("\(device.name) has no statistics: start the machine with `--balloon stats=SECONDS`")
        }
        return "the guest is asked for statistics every \(seconds) s"
    }

    func hints(
        _ answer: String, _ body: (BalloonDevice) -> Bool
    ) throws(MachineControlError) -> String {
        let device = try control.balloonDevice()
        guard body(device) else {
            throw .refused("\(device.name) takes no hints: start the machine with `--balloon hinting=on`")
        }
        return answer
    }
}

extension BalloonStatistics {
    /// Two lines: the balloon, and what the guest says of its memory, if it says something.
    var report: String {
        var first = "balloon0: \(byteText(actual)) of \(byteText(target)) given up by the guest"
        let sums = [("inflated", inflated), ("reported", reported), ("hinted", hinted)].filter { $0.1 > 0 }
        if !sums.isEmpty {
            first +=
                "; returned to the host: " + sums.map { "\(MachineStatus.size($0.1)) \($0.0)" }.joined(separator: ", ")
        }
        let figures: [(String, UInt64?)] = [
            ("total", guest.total), ("free", guest.free), ("available", guest.available), ("caches", guest.caches),
        ]
        let known = figures.compactMap { name, value in value.map { "\(MachineStatus.size($0)) \(name)" } }
        return first + (known.isEmpty ? "" : "\nthe guest's memory: " + known.joined(separator: ", "))
    }
}
