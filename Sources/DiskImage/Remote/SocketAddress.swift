// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// Where a stream socket connects to: a `sockaddr` of any family.
struct SocketAddress: Sendable, Equatable {
    /// Its bytes, as many as its family takes.
    let bytes: [UInt8]

    /// The socket of a path, which fits into an address with its final NUL: at most 107 bytes.
    init?(unixPath path: String) {
        var address = sockaddr_un()
        let capacity = MemoryLayout.size(ofValue: address.sun_path)
        let name = path.rawBytes
        guard !name.isEmpty, name.count < capacity, !name.contains(0) else { return nil }
        address.sun_family = sa_family_t(AF_UNIX)
        // Room for the name and a NUL was checked.
        unsafe withUnsafeMutableBytes(of: &address.sun_path) { unsafe $0.copyBytes(from: name) }
        bytes = unsafe withUnsafeBytes(of: &address) { unsafe Array($0) }
    }

    private init(_ bytes: [UInt8]) { self.bytes = bytes }

    /// The addresses of a host, in the order in which they are to be tried. It may ask a name server, and wait for it.
    /// - Parameter isInterrupted: polled several times a second while a server is waited for: whether to cancel.
    /// - Returns: at least one, or why there is none.
    static func resolve(
        host: String, port: UInt16, isInterrupted: (@Sendable () -> Bool)? = nil
    ) -> Result<[SocketAddress], ResolutionError> {
        // For libnbd too, which asks again before it checks a certificate.
        clinux_resolve_hosts_alone()
        guard let isInterrupted else { return lookUp(host, port) }
        // An address is none that anybody is asked for.
        if case .success(let found) = lookUp(host, port, flags: AI_NUMERICHOST) { return .success(found) }
        // Nothing ends getaddrinfo before its time (5 seconds for each server and attempt, by default), so a thread
        // calls it, which is abandoned when the answer is no longer needed. It works on data of its own.
        let answer = Answer()
        do throws(SystemCallError) {
            try Thread.start(name: "resolver", stackSize: 1 << 20) { answer.give(lookUp(host, port)) }.detach()
        } catch {
            return lookUp(host, port)
        }
        return answer.wait(isInterrupted) ?? .failure(.interrupted)
    }

    private static func lookUp(
        _ host: String, _ port: UInt16, flags: Int32 = 0
    ) -> Result<[SocketAddress], ResolutionError> {
        // All zero, so its pointers are nil; they stay so.
        var hints = unsafe addrinfo()
        unsafe hints.ai_socktype = Int32(SOCK_STREAM.rawValue)
        unsafe hints.ai_flags = AI_NUMERICSERV | flags
        var list: UnsafeMutablePointer<addrinfo>?
        let status = unsafe getaddrinfo(host, String(port), &hints, &list)
        // The list is getaddrinfo's own, with addresses as long as it says, until it is freed.
        defer { if let first = unsafe list { unsafe freeaddrinfo(first) } }
        guard status == 0 else { return .failure(.failed(unsafe String(cString: gai_strerror(status)))) }
        var addresses: [SocketAddress] = []
        var next = unsafe list
        while let entry = unsafe next {
            if let address = unsafe entry.pointee.ai_addr {
                let found = unsafe SocketAddress(
                    Array(UnsafeRawBufferPointer(start: address, count: Int(entry.pointee.ai_addrlen))))
                if !addresses.contains(found) { addresses.append(found) }
            }
            unsafe next = entry.pointee.ai_next
        }
        return addresses.isEmpty ? .failure(.failed("it has no address")) : .success(addresses)
    }

    enum ResolutionError: Error {
        case failed(String)
        case interrupted
    }

    /// What a thread has found out, for another that waits for it.
    private final class Answer: Sendable {
        private let monitor = Monitor()
        private let result = Guarded<Result<[SocketAddress], ResolutionError>?>(nil)

        func give(_ found: Result<[SocketAddress], ResolutionError>) {
            monitor.locked {
                result.withLock { $0 = found }
                monitor.broadcast()
            }
        }

        /// - Returns: nil when it was interrupted.
        func wait(_ isInterrupted: () -> Bool) -> Result<[SocketAddress], ResolutionError>? {
            monitor.locked {
                while true {
                    if let found = result.withLock({ $0 }) { return found }
                    if isInterrupted() { return nil }
                    monitor.wait(milliseconds: 100)
                }
            }
        }
    }

    /// Hands the address to a call that takes one.
    func withAddress<Answer>(_ body: (UnsafePointer<sockaddr>, socklen_t) -> Answer) -> Answer {
        unsafe bytes.withUnsafeBytes { buffer in
            // Made as a `sockaddr` of that length; arrays of bytes are aligned for any.
            unsafe body(buffer.baseAddress!.assumingMemoryBound(to: sockaddr.self), socklen_t(buffer.count))
        }
    }
}
