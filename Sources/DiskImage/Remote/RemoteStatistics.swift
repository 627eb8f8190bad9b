// SPDX-License-Identifier: Apache-2.0

internal import Synchronization

/// The counters of a remote disk's connection. Any thread may read them.
public final class RemoteStatistics: Sendable {
    private let connected = Atomic<Bool>(false)
    private let losses = Atomic<UInt64>(0)
    private let connections = Atomic<UInt64>(0)

    init() {}

    /// Indicates whether a connection to the server stands.
    public var isConnected: Bool { connected.load(ordering: .relaxed) }
    /// Connections that were lost after they stood.
    public var lost: UInt64 { losses.load(ordering: .relaxed) }
    /// Connections after the first one.
    public var reconnects: UInt64 { max(1, connections.load(ordering: .relaxed)) - 1 }

    func noteConnected() {
        connections.wrappingAdd(1, ordering: .relaxed)
        connected.store(true, ordering: .relaxed)
    }

    func noteLost() {
        losses.wrappingAdd(1, ordering: .relaxed)
        connected.store(false, ordering: .relaxed)
    }
}
