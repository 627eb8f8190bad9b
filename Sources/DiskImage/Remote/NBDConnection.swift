// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import CNBD
internal import Glibc
internal import Linux

/// What a server says of the disk that it exports.
struct NBDExport: Sendable, Equatable {
    /// Bytes.
    var size: UInt64
    var isReadOnly = false
    var canFlush = false
    var canTrim = false
    var canZero = false
    /// Indicates whether it distinguishes data from holes (`base:allocation`).
    var hasStatus = false
    /// Requests begin and end at multiples of this many bytes, a power of two.
    var minimumBlock: UInt64 = 1
    /// Bytes that a request moves best; 0 where the server does not say.
    var preferredBlock: UInt64 = 0
    /// The most bytes that a request moves.
    var maximumPayload: UInt64 = defaultPayload

    /// What every server takes (NBD protocol, "Block size constraints").
    static let defaultPayload: UInt64 = 32 << 20
    /// The largest minimum that the protocol allows.
    static let largestMinimum: UInt64 = 64 << 10

    /// Indicates whether a connection that finds this one may continue with what was found first; else what has
    /// changed.
    func difference(from first: NBDExport) -> String? {
        if size != first.size { return "a disk of \(size) bytes, previously \(first.size)" }
        if isReadOnly, !first.isReadOnly { return "a read-only disk, previously writable" }
        if minimumBlock != first.minimumBlock {
            return "blocks of at least \(minimumBlock) bytes, previously \(first.minimumBlock)"
        }
        if maximumPayload < first.maximumPayload {
            return "requests of at most \(maximumPayload) bytes, previously \(first.maximumPayload)"
        }
        for (name, now, before) in [
            ("flush", canFlush, first.canFlush), ("trim", canTrim, first.canTrim),
            ("write zeroes", canZero, first.canZero),
            ("block status", hasStatus, first.hasStatus),
        ] where before && !now {
            return "a disk without \(name), which it had before"
        }
        return nil
    }
}

/// Something that libnbd could not do.
struct NBDFailure: Error, Equatable {
    let reason: String
    /// 0 where there is none.
    let errno: Int32

    init(_ reason: String, errno: Int32 = 0) {
        self.reason = reason
        self.errno = errno
    }

    /// What the calling thread's last call of libnbd has failed for.
    static var last: NBDFailure {
        let error = nbd_get_errno()
        // A text of the thread's own until its next call.
        guard let text = unsafe nbd_get_error() else { return NBDFailure("the connection was closed", errno: error) }
        var reason = unsafe String(cString: text)[...]
        // It begins with the name of the function, which means nothing to the user.
        if reason.hasPrefix("nbd_"), let end = reason.firstOccurrence(of: ": ") { reason = reason[end.upperBound...] }
        return NBDFailure(String(reason), errno: error)
    }
}

/// One connection with a server, from its first packet to its end: the owner of libnbd's handle. One thread at a time
/// uses it.
@safe final class NBDConnection: @unchecked Sendable {
    // Used by one thread at a time, as its owner sees to: hence `Sendable`.
    private let handle: OpaquePointer

    /// What has come of it.
    enum Stage {
        case connecting, ready, dead
    }

    /// Begins to connect with an address.
    convenience init(_ location: NBDLocation, to address: SocketAddress) throws(NBDFailure) {
        try self.init(location)
        if location.security != nil, case .tcp(let host, let port) = location.server {
            // Only with the host's name does libnbd check that the certificate is that host's. It resolves the name
            // again.
            try check(unsafe nbd_aio_connect_tcp(handle, host, String(port)))
            return
        }
        try check(unsafe address.withAddress { address, length in unsafe nbd_aio_connect(handle, address, length) })
    }

    /// Begins to talk over a socket that is connected.
    convenience init(_ location: NBDLocation, adopting socket: consuming FileDescriptor) throws(NBDFailure) {
        try self.init(location)
        // libnbd's from here on, whatever comes of it.
        try check(unsafe nbd_aio_connect_socket(handle, socket.release()))
    }

    private init(_ location: NBDLocation) throws(NBDFailure) {
        // Closed in `deinit`.
        guard let handle = unsafe nbd_create() else { throw .last }
        // Alone with its owner; every call below gets the live handle and copies its texts.
        unsafe self.handle = handle
        try check(unsafe nbd_set_export_name(handle, location.export))
        try check(unsafe nbd_add_meta_context(handle, "base:allocation"))
        // A read that succeeds has filled all of its memory: libnbd sees to that, and need not clear it first.
        try check(unsafe nbd_set_pread_initialize(handle, false))
        guard let security = location.security else {
            try check(unsafe nbd_set_tls(handle, Int32(LIBNBD_TLS_DISABLE)))
            return
        }
        if security.verifiesPeer, security.keyFile == nil {
            // Where this file is not, libnbd continues and checks neither certificate nor host.
            let authorities = (security.certificates ?? "") + "/ca-cert.pem"
            // A text for the call.
            guard authorities.withRawCString({ unsafe access($0, R_OK) }) == 0 else {
                throw NBDFailure("\(authorities): \(SystemCallError.last("access"))")
            }
        }
        // libnbd copies each text.
        try check(unsafe nbd_set_tls(handle, Int32(LIBNBD_TLS_REQUIRE)))
        try check(unsafe nbd_set_tls_verify_peer(handle, security.verifiesPeer))
        if let user = security.user { try check(unsafe nbd_set_tls_username(handle, user)) }
        if let directory = security.certificates {
            try check(directory.withRawCString { unsafe nbd_set_tls_certificates(handle, $0) })
        }
        if let file = security.keyFile { try check(file.withRawCString { unsafe nbd_set_tls_psk_file(handle, $0) }) }
    }

    deinit {
        // This is the only owner, and no callback runs after it.
        unsafe nbd_close(handle)
    }

    /// Sends a disconnect request, if the socket accepts it without waiting.
    func disconnect() {
        if stage == .ready { _ = unsafe nbd_aio_disconnect(handle, 0) }
    }

    // MARK: - Its life

    var stage: Stage {
        // Between two requests it is ready, within one it is processing.
        if unsafe nbd_aio_is_ready(handle) == 1 || nbd_aio_is_processing(handle) == 1 { return .ready }
        if unsafe nbd_aio_is_dead(handle) == 1 || nbd_aio_is_closed(handle) == 1 { return .dead }
        return .connecting
    }

    /// The socket; -1 when there is none.
    var descriptor: Int32 { unsafe nbd_aio_get_fd(handle) }

    /// What the socket is to be waited for.
    var events: Epoll.Events {
        let direction = unsafe nbd_aio_get_direction(handle)
        var events: Epoll.Events = []
        if direction & UInt32(LIBNBD_AIO_DIRECTION_READ) != 0 { events.insert(.input) }
        if direction & UInt32(LIBNBD_AIO_DIRECTION_WRITE) != 0 { events.insert(.output) }
        return events
    }

    /// Goes on with what the socket is ready for.
    func notify(_ ready: Epoll.Events) throws(NBDFailure) {
        // An error is found by reading, or, while it connects, by looking whether it could be written to.
        let events = self.events
        let isBroken = !ready.isDisjoint(with: [.hangUp, .error])
        if events.contains(.input), ready.contains(.input) || isBroken {
            return try check(unsafe nbd_aio_notify_read(handle))
        }
        if events.contains(.output), ready.contains(.output) || isBroken {
            try check(unsafe nbd_aio_notify_write(handle))
        }
    }

    /// Has the kernel find out within half a minute that a host on the network is gone.
    func watchPeer() {
        func set(_ level: Int32, _ option: Int32, _ value: Int32) {
            var value = value
            // Not for UNIX sockets, which refuse it and need it not.
            _ = unsafe setsockopt(descriptor, level, option, &value, socklen_t(MemoryLayout<Int32>.size))
        }
        set(SOL_SOCKET, SO_KEEPALIVE, 1)
        set(Int32(IPPROTO_TCP), TCP_KEEPIDLE, 10)
        set(Int32(IPPROTO_TCP), TCP_KEEPINTVL, 5)
        set(Int32(IPPROTO_TCP), TCP_KEEPCNT, 4)
        set(Int32(IPPROTO_TCP), TCP_USER_TIMEOUT, 30_000)
    }

    /// What the server says of its disk, once the connection is ready.
    func export() throws(NBDFailure) -> NBDExport {
        let size = unsafe nbd_get_size(handle)
        guard size >= 0 else { throw .last }
        guard UInt64(size) <= DiskImage.maximumSize else {
            throw NBDFailure("the server says that its disk has \(size) bytes")
        }
        var export = NBDExport(size: UInt64(size))
        export.isReadOnly = unsafe nbd_is_read_only(handle) == 1
        export.canFlush = unsafe nbd_can_flush(handle) == 1
        export.canTrim = unsafe nbd_can_trim(handle) == 1
        export.canZero = unsafe nbd_can_zero(handle) == 1
        export.hasStatus = unsafe nbd_can_meta_context(handle, "base:allocation") == 1
        func block(_ kind: Int) -> UInt64 { UInt64(clamping: unsafe nbd_get_block_size(handle, Int32(kind))) }
        // 0 is what a server does not say.
        let minimum = block(Int(LIBNBD_SIZE_MINIMUM)), preferred = block(Int(LIBNBD_SIZE_PREFERRED)),
            maximum = block(Int(LIBNBD_SIZE_MAXIMUM))
        if minimum > 0 { export.minimumBlock = minimum }
        export.preferredBlock = preferred
        if maximum > 0 { export.maximumPayload = min(maximum, NBDExport.defaultPayload) }
        guard export.minimumBlock & (export.minimumBlock - 1) == 0, export.minimumBlock <= NBDExport.largestMinimum,
            export.maximumPayload >= export.minimumBlock
        else {
            throw NBDFailure("the server requires requests of \(minimum) to \(maximum) bytes, which NBD does not allow")
        }
        return export
    }

    // MARK: - Requests

    /// Sends a request; it is answered through the command's memory, which stays where it is until then. A request that
    /// libnbd refuses is not sent.
    func send(_ command: UnsafeMutablePointer<NBDCommand>) throws(NBDFailure) {
        // An element of the disk's slab, which stays where it is.
        let done = unsafe nbd_completion_callback(
            callback: completed, user_data: UnsafeMutableRawPointer(command), free: nil)
        let (offset, length) = unsafe (command.pointee.sentOffset, command.pointee.sentLength)
        // The command's owner guarantees its memory, which has that many bytes.
        let memory = unsafe command.pointee.memory?.prefix(
            Int(command.pointee.sending == .read || command.pointee.sending == .write ? length : 0)
        ).start
        let cookie: Int64
        switch unsafe command.pointee.sending {
        case .read: cookie = unsafe nbd_aio_pread(handle, memory, Int(length), offset, done, 0)
        case .write: cookie = unsafe nbd_aio_pwrite(handle, memory, Int(length), offset, done, 0)
        case .flush: cookie = unsafe nbd_aio_flush(handle, done, 0)
        case .trim: cookie = unsafe nbd_aio_trim(handle, length, offset, done, 0)
        case .zero: cookie = unsafe nbd_aio_zero(handle, length, offset, done, 0)
        case .zeroKeeping: cookie = unsafe nbd_aio_zero(handle, length, offset, done, UInt32(LIBNBD_CMD_FLAG_NO_HOLE))
        case .status:
            let extents = unsafe nbd_extent_callback(
                callback: described, user_data: UnsafeMutableRawPointer(command), free: nil)
            cookie = unsafe nbd_aio_block_status(handle, length, offset, extents, done, 0)
        }
        if cookie < 0 { throw .last }
    }

    private func check(_ result: Int32) throws(NBDFailure) {
        if result < 0 { throw .last }
    }
}

/// libnbd's word that a request has ended. It comes within a call on the connection, on the caller's thread.
private func completed(_ data: UnsafeMutableRawPointer?, _ error: UnsafeMutablePointer<Int32>?) -> Int32 {
    // The command of `send`, alive since then.
    guard let command = unsafe data?.assumingMemoryBound(to: NBDCommand.self) else { return 1 }
    unsafe command.pointee.answer(error?.pointee ?? EIO)
    // 1: libnbd may forget it.
    return 1
}

/// libnbd's word of how a range is stored: pairs of a length and flags.
private func described(
    _ data: UnsafeMutableRawPointer?, _ context: UnsafePointer<CChar>?, _ offset: UInt64,
    _ entries: UnsafeMutablePointer<UInt32>?, _ count: Int,
    _ error: UnsafeMutablePointer<Int32>?
) -> Int32 {
    guard let command = unsafe data?.assumingMemoryBound(to: NBDCommand.self), let entries = unsafe entries else {
        return 0
    }
    // As many as libnbd says; the answer takes what it has room for.
    if let answer = unsafe command.pointee.extents, unsafe offset == command.pointee.sentOffset {
        for index in stride(from: 0, to: count - 1, by: 2) {
            let flags = unsafe entries[index + 1]
            unsafe answer.append(length: entries[index], readsAsZeroes: flags & UInt32(LIBNBD_STATE_ZERO) != 0)
        }
    }
    return 0
}
