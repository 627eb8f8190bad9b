// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// What is asked of a remote disk, from the user's call to its end.
///
/// libnbd moves data between the socket and one piece of memory. A transfer whose segments lie one after the other, as pages of a guest mostly
/// do, is moved from and to where they are. Others go through memory of our own: one request and a copy cost less than a request, with
/// its header and its turn at the server, for each page.
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

    /// Makes room for so many commands. None is under way.
    func reserve(_ count: Int) {
        guard unsafe count > commands.count else { return }
        precondition(inUse == 0 && ended.isEmpty)
        unsafe commands.deallocate()
        unsafe commands = .allocate(capacity: count)
        unsafe commands.initialize(repeating: NBDCommand(board: board))
        freeCommand = -1
        for index in (0..<Int32(count)).reversed() {
            unsafe self[index].pointee.index = index
            unsafe self[index].pointee.next = freeCommand
            freeCommand = index
        }
    }

    /// A command by its number, which is one of our own lists' always.
    subscript(index: Int32) -> UnsafeMutablePointer<NBDCommand> { unsafe commands.baseAddress! + Int(index) }

    // MARK: - Asking

    /// Takes a command for a transfer, of as many bytes as are moved at once.
    /// - Returns: nil when all commands are taken.
    func begin(_ request: NBDRequest, _ vectors: UnsafePointer<iovec>, count: Int, at offset: UInt64, token: UInt64, isAwaited: Bool = false) -> Int32? {
        guard let index = acquire(request, at: offset, length: 0, token: token, isAwaited) else { return nil }
        let command = unsafe self[index]
        unsafe command.pointee.vectors = vectors
        unsafe command.pointee.segments = count
        // As many vectors as the user says; of the first ones, those that lie one after the other in memory.
        var total: UInt64 = 0, isOnePiece = true
        let start = unsafe vectors[0].iov_base
        for segment in 0..<count {
            let (base, length) = unsafe (vectors[segment].iov_base, vectors[segment].iov_len)
            if let start = unsafe start, let base = unsafe base, length > 0, unsafe base != start + Int(total) { isOnePiece = false }
            total += UInt64(length)
        }
        guard offset < export.size else {
            // The end of the disk: nothing can be read there, and nothing kept.
            end(index, error: request == .write ? ENOSPC : 0)
            return index
        }
        total = min(total, export.size - offset)
        let block = export.minimumBlock, into = offset & (block - 1)
        let isAligned = into == 0 && (total & (block - 1) == 0 || offset + total == export.size)
        let payload = min(export.maximumPayload & ~(block - 1), Self.transferLimit)
        if isOnePiece, isAligned {
            let length = min(total, payload)
            unsafe command.pointee.length = length
            unsafe set(command, request, offset, length, start)
        } else {
            // Whole blocks of the server's, with ours among their bytes.
            let length = min(total, min(payload, UInt64(Self.bounceSize)) - into)
            let last = min((offset + length + block - 1) & ~(block - 1), export.size)
            unsafe command.pointee.length = length
            unsafe command.pointee.isPartial = request == .write && (into != 0 || offset + length != last)
            let sending: NBDRequest = unsafe command.pointee.isPartial ? .read : request
            unsafe set(command, sending, offset - into, last - (offset - into), nil)
        }
        append(index, to: &waiting)
        return index
    }

    /// Takes a command for what transfers nothing.
    func begin(
        _ request: NBDRequest, at offset: UInt64, length: UInt64, token: UInt64, isAwaited: Bool = false, extents: UnsafeMutablePointer<NBDExtents>? = nil
    ) -> Int32? {
        guard let index = acquire(request, at: offset, length: length, token: token, isAwaited) else { return nil }
        let command = unsafe self[index]
        unsafe command.pointee.extents = extents
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
            unsafe command.pointee.offset = first
            unsafe command.pointee.length = last - first
            prepareRange(index)
        case .status:
            unsafe set(command, request, offset, length, nil)
        case .flush, .read, .write:
            unsafe set(command, request, 0, 0, nil)
        }
        append(index, to: &waiting)
        return index
    }

    private func acquire(_ request: NBDRequest, at offset: UInt64, length: UInt64, token: UInt64, _ isAwaited: Bool) -> Int32? {
        guard freeCommand >= 0 else { return nil }
        let index = freeCommand
        let command = unsafe self[index]
        freeCommand = unsafe command.pointee.next
        unsafe command.initialize(to: NBDCommand(board: board))
        unsafe command.pointee.index = index
        unsafe command.pointee.state = .waiting
        unsafe command.pointee.request = request
        unsafe command.pointee.token = token
        unsafe command.pointee.offset = offset
        unsafe command.pointee.length = length
        unsafe command.pointee.isAwaited = isAwaited
        inUse += 1
        return index
    }

    private func set(_ command: UnsafeMutablePointer<NBDCommand>, _ sending: NBDRequest, _ offset: UInt64, _ length: UInt64, _ memory: UnsafeMutableRawPointer?) {
        unsafe command.pointee.sending = sending
        unsafe command.pointee.sentOffset = offset
        unsafe command.pointee.sentLength = length
        unsafe command.pointee.memory = memory
    }

    private func prepareRange(_ index: Int32) {
        let command = unsafe self[index]
        let done = unsafe command.pointee.done
        unsafe set(command, command.pointee.request, command.pointee.offset + done, min(command.pointee.length - done, Self.rangeLimit), nil)
    }

    // MARK: - Sending

    /// Sends what waits, as far as it can be sent.
    func issue() {
        while isUp, waiting.first >= 0 {
            let index = waiting.first
            let command = unsafe self[index]
            guard unsafe mayStart(command.pointee), prepareMemory(index) else { return }
            removeFirst(&waiting)
            unsafe command.pointee.state = .sent
            if unsafe command.pointee.isPartial { exclusive = index }
            outage.asked(now())
            if unsafe command.pointee.sending.changes { changing += 1 }
            if let extents = unsafe command.pointee.extents { unsafe extents.pointee.clear() }
            do throws(NBDFailure) { try unsafe send(command) } catch {
                // Not sent at all. A connection that has ended meanwhile is not the request's fault.
                if unsafe command.pointee.sending.changes { changing -= 1 }
                unsafe command.pointee.state = .waiting
                guard isUp else { return prepend(index, to: &waiting) }
                end(index, error: error.errno == 0 ? EIO : error.errno)
            }
        }
    }

    private func mayStart(_ command: NBDCommand) -> Bool {
        if command.isPartial { return exclusive == command.index || (exclusive < 0 && changing == 0) }
        return exclusive < 0 || !command.request.changes
    }

    /// Gives a transfer that needs it memory of our own; false when none is left.
    private func prepareMemory(_ index: Int32) -> Bool {
        let command = unsafe self[index]
        let request = unsafe command.pointee.request
        guard request == .read || request == .write, unsafe command.pointee.memory == nil else { return true }
        guard let bounce = freeBounces.popLast() else { return false }
        unsafe command.pointee.bounce = bounce
        // One of `bounceCount` parts of the mapping.
        unsafe command.pointee.memory = bounces.start + Int(bounce) * Self.bounceSize
        if unsafe request == .write && !command.pointee.isPartial { move(index) }
        return true
    }

    /// Copies between the user's memory and our own.
    private func move(_ index: Int32) {
        let command = unsafe self[index]
        guard let vectors = unsafe command.pointee.vectors, let memory = unsafe command.pointee.memory else { return }
        // Where in the blocks the user's bytes begin.
        var own = unsafe memory + Int(command.pointee.offset - command.pointee.sentOffset)
        var left = unsafe Int(command.pointee.length)
        let isRead = unsafe command.pointee.request == .read
        for segment in unsafe 0..<command.pointee.segments where left > 0 {
            let count = unsafe min(vectors[segment].iov_len, left)
            // A guest's memory: only by the helpers that the compiler does not look into.
            if let base = unsafe vectors[segment].iov_base {
                if isRead { unsafe clinux_copy(base, own, count) } else { unsafe clinux_copy(own, base, count) }
            }
            unsafe own += count
            left -= count
        }
    }

    // MARK: - Answers

    /// Indicates whether answers are there that nobody has looked at.
    var hasAnswers: Bool { unsafe board.pointee.firstAnswered >= 0 }

    /// Looks at what the server has answered.
    func collect() {
        // Taken off in the callbacks' order by the connection's thread, which this is.
        var index = unsafe board.pointee.firstAnswered
        unsafe board.pointee.firstAnswered = -1
        while index >= 0 {
            let next = unsafe self[index].pointee.next
            collect(index)
            index = next
        }
    }

    private func collect(_ index: Int32) {
        let command = unsafe self[index]
        if unsafe command.pointee.sending.changes { changing -= 1 }
        let error = unsafe command.pointee.error
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
        switch unsafe command.pointee.request {
        case .read:
            if unsafe command.pointee.bounce >= 0 { move(index) }
            end(index, error: 0)
        case .write where unsafe command.pointee.sending == .read:
            // The blocks are here: now ours into them, and back.
            move(index)
            unsafe command.pointee.sending = .write
            unsafe command.pointee.state = .waiting
            prepend(index, to: &waiting)
        case .trim, .zero, .zeroKeeping:
            unsafe command.pointee.done += command.pointee.sentLength
            guard unsafe command.pointee.done < command.pointee.length else { return end(index, error: 0) }
            prepareRange(index)
            unsafe command.pointee.lostAt = nil
            unsafe command.pointee.state = .waiting
            append(index, to: &waiting)
        case .write, .flush, .status:
            end(index, error: 0)
        }
    }

    /// The connection is given up: what was sent over it waits for the next one.
    func reclaim() {
        collect()
        for index in unsafe 0..<Int32(commands.count) where unsafe self[index].pointee.state == .sent { again(index) }
        changing = 0
    }

    private func again(_ index: Int32) {
        let command = unsafe self[index]
        let now = now()
        if let lostAt = unsafe command.pointee.lostAt {
            // Others may be answered meanwhile: it is this one that the server does not survive.
            if now >= lostAt + patience { return end(index, error: EIO) }
        } else {
            unsafe command.pointee.lostAt = now
        }
        unsafe command.pointee.error = 0
        unsafe command.pointee.state = .waiting
        if unsafe command.pointee.isPartial {
            // Somebody else may have changed the blocks by then.
            unsafe command.pointee.sending = .read
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
        let command = unsafe self[index]
        if unsafe command.pointee.bounce >= 0 { unsafe freeBounces.append(command.pointee.bounce) }
        if exclusive == index { exclusive = -1 }
        unsafe command.pointee.bounce = -1
        unsafe command.pointee.state = .ended
        unsafe command.pointee.error = error
        inUse -= 1
        if unsafe !command.pointee.isAwaited { append(index, to: &ended) }
    }

    /// Forgets a command that has ended.
    func release(_ index: Int32) {
        unsafe self[index].pointee.state = .free
        unsafe self[index].pointee.next = freeCommand
        freeCommand = index
    }

    // MARK: - Lists

    private func append(_ index: Int32, to list: inout List) {
        unsafe self[index].pointee.next = -1
        if list.isEmpty { list.first = index } else { unsafe self[list.last].pointee.next = index }
        list.last = index
    }

    private func prepend(_ index: Int32, to list: inout List) {
        unsafe self[index].pointee.next = list.first
        if list.isEmpty { list.last = index }
        list.first = index
    }

    func removeFirst(_ list: inout List) {
        guard list.first >= 0 else { return }
        list.first = unsafe self[list.first].pointee.next
        if list.first < 0 { list.last = -1 }
    }
}
