// SPDX-License-Identifier: Apache-2.0

internal import Synchronization
internal import Virtio

/// Whether a disk has stopped after an error on the host: common to its queues, which then take no requests until the
/// machine is resumed.
final class DiskStop: Sendable {
    private let stopped = Atomic<Bool>(false)
    private let onStop: @Sendable () -> Void

    /// - Parameter onStop: has the machine paused; called by an I/O thread, must not wait.
    init(onStop: @escaping @Sendable () -> Void) { self.onStop = onStop }

    var isStopped: Bool { stopped.load(ordering: .acquiring) }

    /// - Returns: whether the disk had not stopped already.
    func stop() -> Bool {
        guard !stopped.exchange(true, ordering: .acquiringAndReleasing) else { return false }
        onStop()
        return true
    }

    /// - Returns: whether the disk had stopped.
    @discardableResult
    func end() -> Bool { stopped.exchange(false, ordering: .acquiringAndReleasing) }
}

/// Has a queue start the requests again that the host has failed.
struct DiskRetry: DeviceRequest {}

/// Has the disk report what it has only counted.
struct DiskSummary: DeviceRequest {}
