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
    /// - Returns: at least one, or what `gai_strerror` says.
    static func resolve(host: String, port: UInt16) -> Result<[SocketAddress], ResolutionError> {
        // For libnbd too, which asks again before it checks a certificate.
        clinux_resolve_hosts_alone()
        var hints = unsafe addrinfo()
        unsafe hints.ai_socktype = Int32(SOCK_STREAM.rawValue)
        unsafe hints.ai_flags = AI_NUMERICSERV
        var list: UnsafeMutablePointer<addrinfo>?
        let status = unsafe getaddrinfo(host, String(port), &hints, &list)
        // The list is getaddrinfo's own, with addresses as long as it says, until it is freed.
        defer { if let first = unsafe list { unsafe freeaddrinfo(first) } }
        guard status == 0 else { return .failure(ResolutionError(reason: unsafe String(cString: gai_strerror(status)))) }
        var addresses: [SocketAddress] = []
        var next = unsafe list
        while let entry = unsafe next {
            if let address = unsafe entry.pointee.ai_addr {
                let found = unsafe SocketAddress(Array(UnsafeRawBufferPointer(start: address, count: Int(entry.pointee.ai_addrlen))))
                if !addresses.contains(found) { addresses.append(found) }
            }
            unsafe next = entry.pointee.ai_next
        }
        return addresses.isEmpty ? .failure(ResolutionError(reason: "it has no address")) : .success(addresses)
    }

    struct ResolutionError: Error {
        let reason: String
    }

    /// Hands the address to a call that takes one.
    func withAddress<Answer>(_ body: (UnsafePointer<sockaddr>, socklen_t) -> Answer) -> Answer {
        unsafe bytes.withUnsafeBytes { buffer in
            // Made as a `sockaddr` of that length; arrays of bytes are aligned for any.
            unsafe body(buffer.baseAddress!.assumingMemoryBound(to: sockaddr.self), socklen_t(buffer.count))
        }
    }
}
