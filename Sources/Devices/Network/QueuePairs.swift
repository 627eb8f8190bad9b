// SPDX-License-Identifier: Apache-2.0

internal import Synchronization
internal import Virtio

/// Where the queues of a network device with some pairs are (virtio 1.2 §5.1.2): receive and transmit of each pair,
/// then control.
struct QueueLayout {
    /// Pairs that the driver may use: one without VIRTIO_NET_F_MQ.
    let pairs: Int

    /// The control queue comes after the pairs.
    var control: Int { 2 * pairs }

    static func receive(ofPair pair: Int) -> Int { 2 * pair }
    static func transmit(ofPair pair: Int) -> Int { 2 * pair + 1 }

    /// The pair whose thread has a queue, which is the first one's for control; nil for a queue that does not exist.
    func pair(ofQueue index: Int) -> Int? {
        if index == control { return 0 }
        return (0..<control).contains(index) ? index / 2 : nil
    }

    /// The queues of a pair's thread.
    func queues(ofPair pair: Int) -> [Int] {
        [Self.receive(ofPair: pair), Self.transmit(ofPair: pair)] + (pair == 0 ? [control] : [])
    }
}

/// Has a pair give frames to the driver, or not.
final class PairRequest: DeviceRequest {
    let receives: Bool
    /// Indicates whether it is so now.
    let isDone = Atomic<Bool>(false)

    init(receives: Bool) { self.receives = receives }
}

/// The pairs besides the first, as the control queue switches them. It belongs to the first pair's engine; the others'
/// do not know it, since it keeps their threads.
final class PairSwitch: Sendable {
    /// Of pairs 1, 2, …
    private let workers: [DeviceWorker]

    init(_ workers: [DeviceWorker]) { self.workers = workers }

    /// Has the first `count` pairs, and no others, receive (VQ_PAIRS_SET, §5.1.6.5.5): when this returns, no other
    /// gives the driver a frame.
    ///
    /// It waits for the other pairs' threads, which never wait for the first one's.
    /// - Returns: false when that is no number of pairs of this device, or a pair cannot receive because its queue is
    ///   not ready; nothing has changed then.
    func use(_ count: Int, _ port: NetworkPort) -> Bool {
        guard (1...workers.count + 1).contains(count) else { return false }
        let before = port.pairsInUse.load(ordering: .relaxed)
        for pair in before..<max(before, count) where !set(pair, receives: true) {
            for started in (before..<pair).reversed() { set(started, receives: false) }
            return false
        }
        // From the last on: the host moves the last attached queue into a gap.
        for pair in (count..<max(count, before)).reversed() { set(pair, receives: false) }
        port.pairsInUse.store(count, ordering: .relaxed)
        return true
    }

    @discardableResult
    private func set(_ pair: Int, receives: Bool) -> Bool {
        let request = PairRequest(receives: receives)
        workers[pair - 1].perform(request)
        return request.isDone.load(ordering: .acquiring)
    }
}
