// SPDX-License-Identifier: Apache-2.0

public import Linux
public import PCI

/// A machine for a PCI function that only notes what is connected.
public final class RecordingPlatform: PCIPlatform {
    private struct State {
        var routes: [UInt32: MSIMessage] = [:]
        var connections: [Int32: UInt32] = [:]
        var doorbells: [UInt64: Int32] = [:]
        var isPinAsserted = false
        var isRefusing = false
        var mistakes: [String] = []
    }

    private let state = Guarded(State())

    public init() {}

    // MARK: What a test looks at

    public var routes: [UInt32: MSIMessage] { state.withLock { $0.routes } }
    /// Doorbells by their addresses.
    public var doorbells: [UInt64: Int32] { state.withLock { $0.doorbells } }
    public var isPinAsserted: Bool { state.withLock { $0.isPinAsserted } }
    /// What no function may do.
    public var mistakes: [String] { state.withLock { $0.mistakes } }
    public var connectionCount: Int { state.withLock { $0.connections.count } }

    /// What a signal of an eventfd sends; nil when it is not connected.
    public func message(of event: borrowing EventFD) -> MSIMessage? {
        let number = event.rawValue
        return state.withLock { state in state.connections[number].flatMap { state.routes[$0] } }
    }

    /// Refuses all connections from now on, or no more.
    public func setRefusing(_ isRefusing: Bool) { state.withLock { $0.isRefusing = isRefusing } }

    // MARK: What a function calls

    public func addRoute(_ message: MSIMessage) throws(PCIRefusal) -> UInt32 {
        try state.withLock { (state) throws(PCIRefusal) in
            if state.isRefusing { throw PCIRefusal("no route is left") }
            if !message.isInterrupt { state.mistakes.append("a route for \(message)") }
            let route = (UInt32(24)...).first { state.routes[$0] == nil } ?? 0
            state.routes[route] = message
            return route
        }
    }

    public func changeRoute(_ route: UInt32, to message: MSIMessage) throws(PCIRefusal) {
        try state.withLock { (state) throws(PCIRefusal) in
            if state.isRefusing { throw PCIRefusal("the route cannot change") }
            if state.routes[route] == nil { state.mistakes.append("route \(route) was changed and is not there") }
            state.routes[route] = message
        }
    }

    public func removeRoute(_ route: UInt32) {
        state.withLock { state in
            if state.routes.removeValue(forKey: route) == nil {
                state.mistakes.append("route \(route) was removed twice")
            }
            if state.connections.values.contains(route) { state.mistakes.append("route \(route) was removed in use") }
        }
    }

    public func connect(_ event: borrowing EventFD, to route: UInt32) throws(PCIRefusal) {
        let number = event.rawValue
        try state.withLock { (state) throws(PCIRefusal) in
            if state.isRefusing { throw PCIRefusal("the interrupt is refused") }
            if state.connections[number] != nil { state.mistakes.append("an eventfd was connected twice") }
            state.connections[number] = route
        }
    }

    public func disconnect(_ event: borrowing EventFD, from route: UInt32) {
        let number = event.rawValue
        state.withLock { state in
            if state.connections.removeValue(forKey: number) != route {
                state.mistakes.append("a disconnection of nothing")
            }
        }
    }

    public func connectDoorbell(_ event: borrowing EventFD, at address: UInt64) throws(PCIRefusal) {
        let number = event.rawValue
        try state.withLock { (state) throws(PCIRefusal) in
            if state.isRefusing { throw PCIRefusal("the doorbell is refused") }
            if state.doorbells[address] != nil { state.mistakes.append("two doorbells at \(address)") }
            state.doorbells[address] = number
        }
    }

    public func disconnectDoorbell(_ event: borrowing EventFD, at address: UInt64) {
        let number = event.rawValue
        state.withLock { state in
            // One that was refused is disconnected, too.
            if state.doorbells[address] == number { state.doorbells[address] = nil }
        }
    }

    public func setInterruptPin(_ isAsserted: Bool) {
        state.withLock { state in
            if state.isPinAsserted == isAsserted { state.mistakes.append("the pin was \(isAsserted) before") }
            state.isPinAsserted = isAsserted
        }
    }
}

extension IRQFD {
    /// Indicates whether there is a signal that has not been taken.
    public var isSignalled: Bool { event.isSignalled }
}
