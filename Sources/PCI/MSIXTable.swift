// SPDX-License-Identifier: Apache-2.0

public import Linux

/// The MSI-X table and pending bits of a function (PCI Express 5.0 §7.7.2, §6.1.4).
///
/// A **source** is what raises interrupts, with an eventfd of its own; the driver assigns it a vector, or none. While
/// the vector's message may be sent, the eventfd is connected to the vector's route, and the kernel sends the message.
/// While it is masked, the eventfd is connected to nothing and keeps the signal: it is the pending bit, and nothing is
/// lost.
///
/// All is behind one lock, which vCPU threads take. Threads that signal a source do not use it.
public final class MSIXTable: Sendable {
    /// Bytes of an entry.
    public static let entrySize = 16
    /// What a driver assigns to have no interrupt (virtio 1.2 §4.1.5.1.2).
    public static let noVector: UInt16 = 0xffff

    private struct Entry {
        var message = MSIMessage()
        var control: UInt32 = 1
        /// The route, and what it sends.
        var route: (number: UInt32, message: MSIMessage)?

        var isMasked: Bool { control & 1 != 0 }
    }

    private struct Source {
        var vector = MSIXTable.noVector
        var route: UInt32?
    }

    /// The message control bits of the function's configuration space.
    public struct Control: Sendable, Equatable {
        public var isEnabled = false
        /// Indicates whether all vectors are masked.
        public var isMasked = false
        /// Indicates whether the function may write at all.
        public var isBusMaster = false

        public init() {}
    }

    private struct State {
        var entries: [Entry]
        var sources: [Source]
        var control = Control()
    }

    /// Vectors.
    public let count: Int
    private let events: [IRQFD]
    private let platform: any PCIPlatform
    private let report: @Sendable (PCIRefusal) -> Void
    private let state: Guarded<State>

    /// - Parameters:
    ///   - count: vectors, from 1 to 2048.
    ///   - sources: one for each source.
    ///   - report: gets what the host refuses; the interrupt is missing then.
    public init(
        count: Int, sources: [IRQFD], platform: any PCIPlatform, report: @escaping @Sendable (PCIRefusal) -> Void
    ) {
        self.count = count
        events = sources
        self.platform = platform
        self.report = report
        state = Guarded(
            State(
                entries: Array(repeating: Entry(), count: count),
                sources: Array(repeating: Source(), count: sources.count)))
    }

    // MARK: Control

    /// Applies the current message control bits.
    public func setControl(_ control: Control) {
        state.withLock { state in
            let before = state.control
            guard control != before else { return }
            state.control = control
            if control.isEnabled != before.isEnabled {
                // What was signalled while there were no messages was shown by the interrupt pin.
                for event in events { event.event.drain() }
            }
            for source in state.sources.indices { connect(source, &state) }
            if !control.isEnabled { removeRoutes(&state) }
        }
    }

    /// Assigns a vector to a source; one that does not exist assigns none.
    public func assign(_ vector: UInt16, to source: Int) {
        state.withLock { state in
            guard state.sources.indices.contains(source) else { return }
            let vector = Int(vector) < count ? vector : Self.noVector
            guard vector != state.sources[source].vector else { return }
            // With no vector a signal is no interrupt, also later.
            if state.sources[source].vector == Self.noVector { events[source].event.drain() }
            state.sources[source].vector = vector
            connect(source, &state)
        }
    }

    /// The vector of a source.
    public func vector(of source: Int) -> UInt16 {
        state.withLock { $0.sources.indices.contains(source) ? $0.sources[source].vector : Self.noVector }
    }

    /// Takes the vectors of all sources away, as a reset of the device does.
    public func unassignAll() {
        state.withLock { state in
            for source in state.sources.indices {
                state.sources[source].vector = Self.noVector
                connect(source, &state)
            }
        }
    }

    /// Disconnects everything; the function leaves the machine.
    public func disconnectAll() { setControl(Control()) }

    // MARK: Accesses

    /// Reads 4 or 8 aligned bytes of the table; all ones for other accesses, and where no entry is.
    public func readTable(at offset: UInt64, size: Int) -> UInt64 {
        guard let (index, field) = entry(offset, size) else { return allOnes(size: size) }
        return state.withLock { state in
            let entry = state.entries[index]
            let low = Self.field(field, entry)
            return size == 4 ? UInt64(low) : UInt64(low) | UInt64(Self.field(field + 4, entry)) << 32
        }
    }

    /// Writes 4 or 8 aligned bytes of the table.
    public func writeTable(_ value: UInt64, at offset: UInt64, size: Int) {
        guard let (index, field) = entry(offset, size) else { return }
        state.withLock { state in
            Self.set(field, UInt32(truncatingIfNeeded: value), &state.entries[index])
            if size == 8 { Self.set(field + 4, UInt32(truncatingIfNeeded: value >> 32), &state.entries[index]) }
            for source in state.sources.indices where Int(state.sources[source].vector) == index {
                connect(source, &state)
            }
        }
    }

    /// Reads 4 or 8 aligned bytes of the pending bits; all ones for other accesses.
    public func readPendingBits(at offset: UInt64, size: Int) -> UInt64 {
        guard size == 4 || size == 8, offset % UInt64(size) == 0, offset < UInt64((count + 63) / 64 * 8) else {
            return allOnes(size: size)
        }
        return state.withLock { state in
            var bits: UInt64 = 0
            guard state.control.isEnabled else { return bits }
            for (source, assigned) in state.sources.enumerated()
            where assigned.vector != Self.noVector && assigned.route == nil && events[source].event.isSignalled {
                let bit = UInt64(assigned.vector) &- offset &* 8
                if bit < UInt64(8 * size) { bits |= 1 << bit }
            }
            return bits
        }
    }

    private func entry(_ offset: UInt64, _ size: Int) -> (index: Int, field: Int)? {
        guard size == 4 || size == 8, offset % UInt64(size) == 0, offset < UInt64(count * Self.entrySize) else {
            return nil
        }
        return (Int(offset) / Self.entrySize, Int(offset) % Self.entrySize)
    }

    private static func field(_ field: Int, _ entry: Entry) -> UInt32 {
        switch field {
        case 0: UInt32(truncatingIfNeeded: entry.message.address)
        case 4: UInt32(truncatingIfNeeded: entry.message.address >> 32)
        case 8: entry.message.data
        default: entry.control
        }
    }

    private static func set(_ field: Int, _ value: UInt32, _ entry: inout Entry) {
        switch field {
        case 0: entry.message.address = entry.message.address & ~0xffff_ffff | UInt64(value & ~3)
        case 4: entry.message.address = entry.message.address & 0xffff_ffff | UInt64(value) << 32
        case 8: entry.message.data = value
        default: entry.control = value & 1
        }
    }

    // MARK: Connections

    /// Connects a source's eventfd to where it belongs now.
    private func connect(_ source: Int, _ state: inout State) {
        let wanted = route(for: state.sources[source].vector, &state)
        guard wanted != state.sources[source].route else { return }
        if let old = state.sources[source].route { platform.disconnect(events[source].event, from: old) }
        state.sources[source].route = nil
        guard let wanted else { return }
        do throws(PCIRefusal) {
            try platform.connect(events[source].event, to: wanted)
            state.sources[source].route = wanted
        } catch { report(error) }
    }

    /// The route of a vector whose message may be sent now.
    private func route(for vector: UInt16, _ state: inout State) -> UInt32? {
        let control = state.control
        guard Int(vector) < count, control.isEnabled, control.isBusMaster, !control.isMasked else { return nil }
        let entry = state.entries[Int(vector)], message = entry.message
        guard !entry.isMasked, message.isInterrupt else { return nil }
        do throws(PCIRefusal) {
            if let route = entry.route {
                if route.message != message { try platform.changeRoute(route.number, to: message) }
                state.entries[Int(vector)].route = (route.number, message)
                return route.number
            }
            let number = try platform.addRoute(message)
            state.entries[Int(vector)].route = (number, message)
            return number
        } catch {
            report(error)
            return nil
        }
    }

    private func removeRoutes(_ state: inout State) {
        for index in state.entries.indices {
            guard let route = state.entries[index].route else { continue }
            platform.removeRoute(route.number)
            state.entries[index].route = nil
        }
    }
}
