// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import GuestMemory
internal import Linux
internal import Synchronization
internal import Virtio

/// What the balloon's driver says of pages, and what becomes of them.
extension BalloonEngine {
    // MARK: Inflating and deflating

    /// Loads the next page numbers of a queue's request; false at its end.
    private mutating func loadNumbers(_ line: Int, _ pieces: inout Int) -> Bool {
        guard let chain = lines[line]?.chain, let done = lines[line]?.done else { return false }
        numbers.load(chain.readable, at: done)
        pieces -= 1
        return numbers.count > 0
    }

    /// - Returns: whether the request is done.
    mutating func inflate(_ pieces: inout Int) -> Bool {
        let line = BalloonQueue.inflate.rawValue
        while pieces > 0 {
            guard loadNumbers(line, &pieces) else { return true }
            while let run = numbers.nextRun() {
                eachRange(of: run) { engine, range in engine.inflate(range) }
            }
            lines[line]?.done += UInt64(numbers.count) * PageNumbers.width
        }
        return false
    }

    /// - Returns: whether the request is done. If not, and pieces are left, it waits for a huge page of the host's.
    mutating func deflate(_ pieces: inout Int) -> Bool {
        let line = BalloonQueue.deflate.rawValue
        // Ordinary pages come when the guest accesses them.
        guard ledger != nil else { return true }
        while pieces > 0 {
            guard loadNumbers(line, &pieces) else { return true }
            var isComplete = true
            while isComplete, let run = numbers.nextRun() {
                eachRange(of: run) { engine, range in isComplete = engine.deflate(range) && isComplete }
            }
            guard isComplete else {
                pieces = max(pieces, 1)
                return false
            }
            lines[line]?.done += UInt64(numbers.count) * PageNumbers.width
        }
        return false
    }

    /// Finds the parts of a run of pages that are RAM, as ranges of the memory; the others are ignored, and counted.
    private mutating func eachRange(
        of run: (first: UInt32, count: UInt32), _ body: (inout BalloonEngine, Range<UInt64>) -> Void
    ) {
        guard let memory = activation?.memory else { return }
        let start = UInt64(run.first) * BalloonSettings.pageSize
        let end = start + UInt64(run.count) * BalloonSettings.pageSize
        var known: UInt64 = 0
        for region in memory.regions {
            let first = max(start, region.start.rawValue), last = min(end, region.end.rawValue)
            guard first < last else { continue }
            let offset = region.offset + (first - region.start.rawValue)
            known += (last - first) / BalloonSettings.pageSize
            body(&self, offset..<offset + (last - first))
        }
        let refused = UInt64(run.count) - known
        guard refused > 0 else { return }
        state.refused.add(refused)
        activation?.counters.errors.add(refused)
        events.report(
            .refusedPages, .warning,
            "the driver used page number 0x\(String(run.first, radix: 16)), or one of the \(run.count) from it on, which is not RAM; it is ignored"
        )
    }

    private mutating func inflate(_ range: Range<UInt64>) {
        guard let memory = activation?.memory else { return }
        guard memory.backing.pageSize > BalloonSettings.pageSize else {
            release(range, count: state.inflated)
            return
        }
        for page in Self.pages(range) where ledger?.insert(page) == true {
            let start = ledger?.offset(of: page) ?? 0
            if release(start..<start + memory.backing.pageSize, count: state.inflated) {
                ledger?.setReleased(page, true)
            }
        }
    }

    /// - Returns: false when the host does not have a huge page.
    private mutating func deflate(_ range: Range<UInt64>) -> Bool {
        guard let memory = activation?.memory else { return true }
        for page in Self.pages(range) {
            if ledger?.isReleased(page) == true {
                do throws(SystemCallError) {
                    try memory.allocate(offset: ledger?.offset(of: page) ?? 0, count: memory.backing.pageSize)
                } catch {
                    events.report(
                        .hostError(operation: 1, errno: error.errno), .warning,
                        "the guest wants memory back, and the host has no huge page for it: the guest waits (\(error))")
                    return false
                }
                ledger?.setReleased(page, false)
            }
            ledger?.remove(page)
        }
        return true
    }

    /// Pages by their numbers in the memory.
    private static func pages(_ range: Range<UInt64>) -> Range<Int> {
        Int(range.lowerBound / BalloonSettings.pageSize)..<Int(range.upperBound / BalloonSettings.pageSize)
    }

    @discardableResult
    private func release(_ range: Range<UInt64>, count: borrowing DeviceCounters.Counter) -> Bool {
        do throws(SystemCallError) {
            try activation?.memory.release(offset: range.lowerBound, count: range.upperBound - range.lowerBound)
            count.add(range.upperBound - range.lowerBound)
            return true
        } catch {
            activation?.counters.errors.add()
            events.report(
                .hostError(operation: 0, errno: error.errno), .warning,
                "memory of the balloon does not go back to the host: \(error)")
            return false
        }
    }

    // MARK: Free pages

    /// Indicates whether what a driver says is free has to keep its contents (§5.5.6.7): the driver fills free pages
    /// with something, and relies on it.
    var hasPoison: Bool {
        activation?.features.contains(.balloonPoison) == true && state.poison.load(ordering: .relaxed) != 0
    }

    /// A command of the driver's, or ranges that belong to the last one.
    mutating func takeHints(_ bytes: inout UInt64) -> Bool {
        let line = BalloonQueue.hints.rawValue, state = self.state
        if let command = lines[line]?.chain?.readable.load(UInt32.self) {
            state.guestHintCommand.withLock { $0 = command }
            if command == BalloonHintCommand.stop, acknowledgesEndOfHints,
                state.hintCommand.load(ordering: .relaxed) >= BalloonHintCommand.firstRun
            {
                setHintCommand(BalloonHintCommand.done)
            }
        }
        let command = state.hintCommand.load(ordering: .relaxed)
        let isCurrent =
            command >= BalloonHintCommand.firstRun && state.guestHintCommand.withLock { $0 } == command
        return takeFreePages(line, &bytes, count: state.hinted, isIgnored: !isCurrent || hasPoison)
    }

    /// Returns the ranges of a queue's request to the host.
    /// - Parameters:
    ///   - bytes: how many may go now.
    ///   - isIgnored: The pages stay.
    /// - Returns: whether the request is done.
    mutating func takeFreePages(
        _ line: Int, _ bytes: inout UInt64, count: borrowing DeviceCounters.Counter, isIgnored: Bool
    ) -> Bool {
        // Huge pages of a pool might not be there when the guest, which does not ask, takes them again.
        guard let memory = activation?.memory, !isIgnored, memory.backing.pageSize == BalloonSettings.pageSize else {
            return true
        }
        while let buffer = unsafe lines[line]?.chain?.writable.first {
            guard bytes > 0 else { return false }
            guard let start = unsafe memory.offset(of: buffer) else { return true }
            let length = unsafe min(UInt64(buffer.iov_len), max(bytes, BalloonSettings.pageSize))
            // Whole pages of it.
            let mask = BalloonSettings.pageSize - 1
            let first = (start + mask) & ~mask, last = (start + length) & ~mask
            if first < last { release(first..<last, count: count) }
            bytes -= min(length, bytes)
            lines[line]?.chain?.writable.removeFirst(length)
        }
        return true
    }
}
