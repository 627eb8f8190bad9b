// SPDX-License-Identifier: Apache-2.0

internal import DiskImage

/// What happens when the host fails a request of a disk (`--on-disk-error`, as QEMU's `werror` and `rerror`).
public enum DiskErrorPolicy: String, Sendable, CaseIterable {
    /// ``stop`` where the host has no room for what is written, otherwise ``report``.
    case enospc
    /// The guest gets an I/O error.
    case report
    /// The disk stops, the machine is paused, and the request is started again when it is resumed.
    case stop
    /// The guest sees the request succeed.
    case ignore

    enum Reaction { case report, stop, ignore }

    /// - Parameter canRetry: whether the request may succeed when it is started again.
    func reaction(to completion: DiskCompletion, canRetry: Bool) -> Reaction {
        switch self {
        case .enospc: canRetry && completion.isOutOfRoom ? .stop : .report
        case .report: .report
        // What cannot succeed would stop the machine again and again.
        case .stop: canRetry ? .stop : .report
        case .ignore: .ignore
        }
    }
}
