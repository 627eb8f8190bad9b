// SPDX-License-Identifier: Apache-2.0

internal import DiskImage
internal import Linux
internal import Virtio

/// Another size for a disk: a request to each of its queues, which take nothing new from then on. The last one of them
/// that has nothing under way any more changes the image, while the others have no reason to touch it.
final class DiskResize: DeviceRequest {
    /// Bytes; nil for as many as the image has now.
    let size: UInt64?

    private struct State {
        /// Queues that still have something under way.
        var left: Int
        var isOver = false
        /// Those of active queues, which are checked again afterwards.
        var doorbells: [Doorbell] = []
        var interrupt: ConfigurationInterrupt?
    }

    private let state: Guarded<State>
    private let completion: @Sendable (Result<UInt64, DiskImageError>) -> Void
    /// Shows the new size to the driver.
    private let apply: @Sendable (UInt64) -> Void

    init(
        size: UInt64?, queues: Int, completion: @escaping @Sendable (Result<UInt64, DiskImageError>) -> Void,
        apply: @escaping @Sendable (UInt64) -> Void
    ) {
        self.size = size
        self.completion = completion
        self.apply = apply
        state = Guarded(State(left: queues))
    }

    /// Indicates whether queues take requests again.
    var isOver: Bool { state.withLock { $0.isOver } }

    /// A queue of an active device takes nothing until it is over.
    func hold(_ doorbell: Doorbell?, _ interrupt: ConfigurationInterrupt?) {
        state.withLock { state in
            if let doorbell { state.doorbells.append(doorbell) }
            if let interrupt { state.interrupt = interrupt }
        }
    }

    /// A queue has nothing under way any more; called once for each.
    /// - Returns: whether none has, so that the caller changes the image now.
    func arrive() -> Bool {
        state.withLock { state in
            state.left -= 1
            return state.left == 0
        }
    }

    /// The image has been changed, or not.
    func end(_ result: Result<UInt64, DiskImageError>) {
        if case .success(let size) = result { apply(size) }
        let (doorbells, interrupt) = state.withLock { state in
            state.isOver = true
            return (state.doorbells, state.interrupt)
        }
        if case .success = result { interrupt?.signal() }
        completion(result)
        for doorbell in doorbells { doorbell.event.signal() }
    }
}
