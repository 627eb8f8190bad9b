// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// What is asked of a remote disk, from the user's call to its end.
///
/// libnbd moves data between the socket and one piece of memory. A transfer whose segments lie one after the other, as
/// pages of a guest mostly do, is moved from and to where they are. Others go through memory of our own: one request
/// and a copy cost less than a request, with its header and its turn at the server, for each page.
extension NBDDisk {
    /// Commands in their order, linked through them.
    struct List {
        var first: Int32 = -1
        var last: Int32 = -1
        var isEmpty: Bool { first < 0 }
    }

    static let bounceSize = 1 << 20, bounceCount = 32
    /// Threads of tools that can wait at a time; others wait for these.
    static let toolCommands = 64
    /// The most bytes of a transfer, and of a request that moves nothing.
    private static let transferLimit: UInt64 = 1 << 20, rangeLimit: UInt64 = 1 << 30

    // MARK: - Asking

    /// Takes a command for a transfer, of as many bytes as are moved in one step.
    /// - Returns: nil when all commands are taken.
    func begin(
        _ request: NBDRequest, _ segments: IOSegments, at offset: UInt64, token: UInt64, isAwaited: Bool = false
    ) -> Int32? {
        guard let index = acquire(request, at: offset, length: 0, token: token, isAwaited) else { return nil }
        commands[index].segments = segments
        let piece = segments.contiguous
        var total = segments.length
        guard offset < export.size else {
            // The end of the disk: nothing can be read there, and nothing kept.
            end(index, error: request == .write ? ENOSPC : 0)
            return index
        }
        total = min(total, export.size - offset)
        let block = export.minimumBlock, into = offset & (block - 1)
        let isAligned = into == 0 && (total & (block - 1) == 0 || offset + total == export.size)
        let payload = min(export.maximumPayload & ~(block - 1), Self.transferLimit)
        if let piece, isAligned {
            let length = min(total, payload)
            commands[index].length = length
            set(index, request, offset, length, piece)
        } else {
            // Whole blocks of the server's, with ours among their bytes.
            let length = min(total, min(payload, UInt64(Self.bounceSize)) - into)
            let last = min((offset + length + block - 1) & ~(block - 1), export.size)
            commands[index].length = length
            commands[index].isPartial = request == .write && (into != 0 || offset + length != last)
            let sending: NBDRequest = commands[index].isPartial ? .read : request
            set(index, sending, offset - into, last - (offset - into), nil)
        }
        append(index, to: &waiting)
        return index
    }

    /// Takes a command for what transfers nothing.
    func begin(
        _ request: NBDRequest, at offset: UInt64, length: UInt64, token: UInt64, isAwaited: Bool = false,
        extents: NBDExtents? = nil
    ) -> Int32? {
        guard let index = acquire(request, at: offset, length: length, token: token, isAwaited) else { return nil }
        commands[index].extents = extents
        switch request {
        case .flush where !export.canFlush:
            // As with a disk that has no cache of its own: nothing can be asked for.
            end(index, error: 0)
            return index
        case .trim where !export.canTrim:
            // Best effort: the server does not support it.
            end(index, error: 0)
            return index
        case .zero where !export.canZero, .zeroKeeping where !export.canZero:
            end(index, error: EOPNOTSUPP)
            return index
        case .trim, .zero, .zeroKeeping:
            let mask = export.minimumBlock - 1
            let limit = min(offset + length, export.size)
            // Only whole blocks; of a trim the others may stay, zeroes are written there.
            let first = (offset + mask) & ~mask, last = limit == export.size ? limit : limit & ~mask
            if request != .trim, first != offset || last != limit { end(index, error: EOPNOTSUPP); return index }
            if first >= last { end(index, error: 0); return index }
            commands[index].offset = first
            commands[index].length = last - first
            prepareRange(index)
        case .status:
            set(index, request, offset, length, nil)
        case .flush, .read, .write:
            set(index, request, 0, 0, nil)
        }
        append(index, to: &waiting)
        return index
    }

    private func acquire(
        _ request: NBDRequest, at offset: UInt64, length: UInt64, token: UInt64, _ isAwaited: Bool
    ) -> Int32? {
        guard freeCommand >= 0 else { return nil }
        let index = freeCommand
        freeCommand = commands[index].next
        commands[index] = NBDCommand(board: board)
        commands[index].index = index
        commands[index].state = .waiting
        commands[index].request = request
        commands[index].token = token
        commands[index].offset = offset
        commands[index].length = length
        commands[index].isAwaited = isAwaited
        inUse += 1
        return index
    }

    private func set(_ index: Int32, _ sending: NBDRequest, _ offset: UInt64, _ length: UInt64, _ memory: IOMemory?) {
        commands[index].sending = sending
        commands[index].sentOffset = offset
        commands[index].sentLength = length
        commands[index].memory = memory
    }

    private func prepareRange(_ index: Int32) {
        let done = commands[index].done
        set(
            index, commands[index].request, commands[index].offset + done,
            min(commands[index].length - done, Self.rangeLimit), nil)
    }

    // MARK: - Sending

    /// Sends what waits, as far as it can be sent.
    func issue() {
        while isUp, waiting.first >= 0 {
            let index = waiting.first
            guard mayStart(index), prepareMemory(index) else { return }
            removeFirst(&waiting)
            commands[index].state = .sent
            if commands[index].isPartial { exclusive = index }
            outage.asked(now())
            if commands[index].sending.changes { changing += 1 }
            commands[index].extents?.clear()
            do throws(NBDFailure) { try send(index) } catch {
                // Not sent at all. A connection that has ended meanwhile is not the request's fault.
                if commands[index].sending.changes { changing -= 1 }
                commands[index].state = .waiting
                guard isUp else { return prepend(index, to: &waiting) }
                end(index, error: error.errno == 0 ? EIO : error.errno)
            }
        }
    }

    private func mayStart(_ index: Int32) -> Bool {
        if commands[index].isPartial { return exclusive == index || (exclusive < 0 && changing == 0) }
        return exclusive < 0 || !commands[index].request.changes
    }

    /// Gives a transfer that needs it memory of our own; false when none is left.
    private func prepareMemory(_ index: Int32) -> Bool {
        let request = commands[index].request
        guard request == .read || request == .write, commands[index].memory == nil else { return true }
        guard let bounce = freeBounces.popLast() else { return false }
        commands[index].bounce = bounce
        commands[index].memory = bounces.piece(Int(bounce) * Self.bounceSize, Self.bounceSize)
        if request == .write && !commands[index].isPartial { move(index) }
        return true
    }

    /// Copies between the user's memory and our own.
    private func move(_ index: Int32) {
        guard let segments = commands[index].segments, let memory = commands[index].memory else { return }
        // Where in the blocks the user's bytes begin.
        let own = memory.piece(Int(commands[index].offset - commands[index].sentOffset), Int(commands[index].length))
        if commands[index].request == .read { segments.copyIn(own, at: 0) } else { segments.copyOut(from: 0, to: own) }
    }

    // MARK: - Answers

    /// Indicates whether replies have not been processed yet.
    var hasAnswers: Bool { board.firstAnswered >= 0 }

    /// Looks at what the server has answered.
    func collect() {
        // Taken off in the callbacks' order by the connection's thread, which this is.
        var index = board.firstAnswered
        board.firstAnswered = -1
        while index >= 0 {
            let next = commands[index].next
            collect(index)
            index = next
        }
    }

    private func collect(_ index: Int32) {
        if commands[index].sending.changes { changing -= 1 }
        let error = commands[index].error
        switch error {
        case 0:
            break
        case ENOTCONN, ESHUTDOWN:
            // No answer to this request: the next connection's server gives one.
            if error == ESHUTDOWN { isShutDown = true }
            return again(index)
        default:
            noteAnswer()
            return end(index, error: error)
        }
        noteAnswer()
        switch commands[index].request {
        case .read:
            if commands[index].bounce >= 0 { move(index) }
            end(index, error: 0)
        case .write where commands[index].sending == .read:
            // The blocks are here: now ours into them, and back.
            move(index)
            commands[index].sending = .write
            commands[index].state = .waiting
            prepend(index, to: &waiting)
        case .trim, .zero, .zeroKeeping:
            commands[index].done += commands[index].sentLength
            guard commands[index].done < commands[index].length else { return end(index, error: 0) }
            prepareRange(index)
            commands[index].lostAt = nil
            commands[index].state = .waiting
            append(index, to: &waiting)
        case .write, .flush, .status:
            end(index, error: 0)
        }
    }

    /// The connection is dropped: requests that were sent over it wait for the next one.
    func reclaim() {
        collect()
        for index in 0..<Int32(commands.count) where commands[index].state == .sent { again(index) }
        changing = 0
    }

    private func again(_ index: Int32) {
        let now = now()
        if let lostAt = commands[index].lostAt {
            // Others may be answered meanwhile: it is this one that the server does not survive.
            if now >= lostAt + patience { return end(index, error: EIO) }
        } else {
            commands[index].lostAt = now
        }
        commands[index].error = 0
        commands[index].state = .waiting
        if commands[index].isPartial {
            // Another client may have changed the blocks by then.
            commands[index].sending = .read
            exclusive = -1
        }
        append(index, to: &waiting)
    }

    func failWaiting(_ error: Int32) {
        while waiting.first >= 0 {
            let index = waiting.first
            removeFirst(&waiting)
            end(index, error: error)
        }
    }

    private func end(_ index: Int32, error: Int32) {
        if commands[index].bounce >= 0 { freeBounces.append(commands[index].bounce) }
        if exclusive == index { exclusive = -1 }
        commands[index].bounce = -1
        commands[index].state = .ended
        commands[index].error = error
        inUse -= 1
        if !commands[index].isAwaited { append(index, to: &ended) }
    }

    /// Forgets a command that has ended.
    func release(_ index: Int32) {
        commands[index].state = .free
        commands[index].next = freeCommand
        freeCommand = index
    }

    // MARK: - Lists

    private func append(_ index: Int32, to list: inout List) {
        commands[index].next = -1
        if list.isEmpty { list.first = index } else { commands[list.last].next = index }
        list.last = index
    }

    private func prepend(_ index: Int32, to list: inout List) {
        commands[index].next = list.first
        if list.isEmpty { list.last = index }
        list.first = index
    }

    func removeFirst(_ list: inout List) {
        guard list.first >= 0 else { return }
        list.first = commands[list.first].next
        if list.first < 0 { list.last = -1 }
    }
}
