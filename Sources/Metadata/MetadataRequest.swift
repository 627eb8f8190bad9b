// SPDX-License-Identifier: Apache-2.0

/// A guest's HTTP request for metadata (RFC 9112), of which that is kept which matters.
struct MetadataRequest {
    var method: String
    /// The path of the target, or all of it if it is no address.
    var path: String
    var isHTTP10: Bool
    /// The connection ends behind the response.
    var closes: Bool
    var acceptsJSON = false
    var token: String?
    var lifetime: String?
    var isForwarded = false

    enum Result {
        /// There is more to come.
        case incomplete
        /// A request, and how many bytes it has.
        case request(MetadataRequest, length: Int)
        case invalid(String)
    }

    /// Reads the request that some bytes begin with.
    static func read(_ bytes: [UInt8]) -> Result {
        var place = 0
        func line() -> [UInt8]? {
            guard let end = bytes[place...].firstIndex(of: 0x0a) else { return nil }
            defer { place = end + 1 }
            let line = bytes[place..<end]
            return Array(line.last == 0x0d ? line.dropLast() : line)
        }
        guard let first = line() else { return .incomplete }
        let words = first.split(separator: 0x20, omittingEmptySubsequences: false)
            .map { String(decoding: $0, as: UTF8.self) }
        guard words.count == 3, !words[0].isEmpty, words[2] == "HTTP/1.1" || words[2] == "HTTP/1.0" else {
            return .invalid("Invalid request line.")
        }
        var request = MetadataRequest(
            method: words[0], path: path(words[1]), isHTTP10: words[2] == "HTTP/1.0", closes: words[2] == "HTTP/1.0")
        var length = 0
        while true {
            guard let line = line() else { return .incomplete }
            if line.isEmpty { break }
            guard let colon = line.firstIndex(of: UInt8(ascii: ":")), colon > 0 else {
                return .invalid("Invalid header.")
            }
            let value = text(line[(colon + 1)...])
            switch text(line[..<colon]).lowercased() {
            case "content-length":
                guard let number = Int(value), (0...MetadataConnection.inputSize).contains(number) else {
                    return .invalid("Invalid Content-Length.")
                }
                length = number
            case "transfer-encoding": return .invalid("Transfer-Encoding is not supported.")
            case "connection":
                if value.lowercased() == "close" { request.closes = true }
                if value.lowercased() == "keep-alive" { request.closes = false }
            case "accept":
                // The first type that is known; others stand for text.
                request.acceptsJSON = value.lowercased().utf8.starts(with: "application/json".utf8)
            case "x-metadata-token", "x-aws-ec2-metadata-token": request.token = value
            case "x-metadata-token-ttl-seconds", "x-aws-ec2-metadata-token-ttl-seconds": request.lifetime = value
            case "x-forwarded-for": request.isForwarded = true
            default: break
            }
        }
        guard bytes.count - place >= length else { return .incomplete }
        return .request(request, length: place + length)
    }

    private static func text(_ bytes: ArraySlice<UInt8>) -> String {
        var bytes = bytes.drop { $0 == 0x20 || $0 == 0x09 }
        while let last = bytes.last, last == 0x20 || last == 0x09 { bytes.removeLast() }
        return String(decoding: bytes, as: UTF8.self)
    }

    /// The path of a target, which may be an address; empty where there is none.
    private static func path(_ target: String) -> String {
        let scheme = "http://"
        guard target.utf8.starts(with: scheme.utf8) else { return target.utf8.first == UInt8(ascii: "/") ? target : "" }
        let rest = target.utf8.dropFirst(scheme.utf8.count)
        return rest.firstIndex(of: UInt8(ascii: "/")).map { String(decoding: rest[$0...], as: UTF8.self) } ?? ""
    }
}

/// The response to a request.
struct MetadataResponse: Equatable {
    var status: Int
    var body: [UInt8]
    var isJSON = false
    /// Further lines of the header.
    var headers: [String] = []

    init(_ status: Int, _ body: String, headers: [String] = []) {
        (self.status, self.body, self.headers) = (status, Array(body.utf8), headers)
    }

    private var reason: String {
        switch status {
        case 200: "OK"
        case 400: "Bad Request"
        case 401: "Unauthorized"
        case 404: "Not Found"
        case 405: "Method Not Allowed"
        default: "Not Implemented"
        }
    }

    /// What is sent.
    func bytes(isHTTP10: Bool, closes: Bool) -> [UInt8] {
        let lines =
            [
                "HTTP/1.\(isHTTP10 ? 0 : 1) \(status) \(reason)", "Server: swkvm",
                "Connection: \(closes ? "close" : "keep-alive")",
                "Content-Type: \(isJSON ? "application/json" : "text/plain")", "Content-Length: \(body.count)",
            ] + headers
        return Array((lines.joined(separator: "\r\n") + "\r\n\r\n").utf8) + body
    }
}

extension MetadataStore {
    private static let tokenPath = "/latest/api/token"

    /// The answer to a request, as Firecracker's metadata service gives it.
    /// - Parameter now: milliseconds of the monotonic clock.
    func respond(to request: MetadataRequest, now: UInt64) -> MetadataResponse {
        guard !request.path.isEmpty else { return MetadataResponse(400, "Invalid URI.") }
        let version = version
        switch request.method {
        case "GET":
            if version == .v2 {
                guard let token = request.token else {
                    return MetadataResponse(
                        401,
                        "No MMDS token provided. Use `X-metadata-token` header to specify the session token.")
                }
                guard isValid(token, now: now) else { return MetadataResponse(401, "MMDS token not valid.") }
            }
            return get(request)
        case "PUT" where version == .v2: return begin(request, now)
        default:
            return MetadataResponse(
                405, "Not allowed HTTP method.", headers: ["Allow: \(version == .v1 ? "GET" : "GET, PUT")"])
        }
    }

    private func get(_ request: MetadataRequest) -> MetadataResponse {
        guard let value = value.value(at: request.path) else {
            return MetadataResponse(404, "Resource not found: \(request.path).")
        }
        if request.acceptsJSON {
            var response = MetadataResponse(200, "")
            (response.body, response.isJSON) = (value.json, true)
            return response
        }
        guard let text = value.text else {
            return MetadataResponse(501, "Cannot retrieve value. The value has an unsupported type.")
        }
        return MetadataResponse(200, text)
    }

    private func begin(_ request: MetadataRequest, _ now: UInt64) -> MetadataResponse {
        guard !request.isForwarded else {
            return MetadataResponse(400, "Invalid header. Reason: Unsupported header name. Key: X-Forwarded-For")
        }
        let parts = request.path.utf8.split(separator: UInt8(ascii: "/"), omittingEmptySubsequences: true)
        guard "/" + parts.map({ String(decoding: $0, as: UTF8.self) }).joined(separator: "/") == Self.tokenPath else {
            return MetadataResponse(404, "Resource not found: \(request.path).")
        }
        guard let text = request.lifetime else {
            return MetadataResponse(
                400,
                "Token time to live value not found. Use `X-metadata-token-ttl-seconds` header to specify the token's lifetime."
            )
        }
        guard let lifetime = UInt32(text), Self.possibleLifetimes.contains(lifetime) else {
            return MetadataResponse(
                400,
                "Invalid time to live value provided for token: \(text). Please provide a value between \(Self.possibleLifetimes.lowerBound) and \(Self.possibleLifetimes.upperBound)."
            )
        }
        return MetadataResponse(
            200, makeToken(lifetime: lifetime, now: now), headers: ["X-metadata-token-ttl-seconds: \(lifetime)"])
    }
}
