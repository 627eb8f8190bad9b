// SPDX-License-Identifier: Apache-2.0

@testable import Metadata
import TestSupport
import Testing

/// What a guest gets by HTTP.
@Suite(.timed) struct MetadataServiceTests {
    private static let text = """
        {"name": {"first": "John", "second": "Doe"}, "age": 43, "phones": ["+401", {"home": "+44"}], "empty": {},
         "a/b~c": "odd", "latest": {"meta-data": {"id": "i-1"}}}
        """

    private func status(_ response: String) -> Substring { response.split(separator: " ")[1] }
    private func body(_ response: String) -> String {
        let parts = response.split(separator: "\r\n", omittingEmptySubsequences: false)
        let end = parts.firstIndex(of: "") ?? parts.count - 1
        return parts[(end + 1)...].joined(separator: "\r\n")
    }

    @Test(arguments: [
        ("/name", "", "200", "first\nsecond"), ("/name/first", "", "200", "John"), ("/name//first/", "", "200", "John"),
        ("http://169.254.169.254/name/second", "", "200", "Doe"),
        ("/", "", "200", "a/b~c\nage\nempty/\nlatest/\nname/\nphones"),
        ("/phones/0", "", "200", "+401"), ("/phones/1", "", "200", "home"), ("/empty", "", "200", ""),
        ("/a~1b~0c", "", "200", "odd"),
        ("/age", "", "501", "Cannot retrieve value. The value has an unsupported type."),
        ("/phones", "", "501", "Cannot retrieve value. The value has an unsupported type."),
        ("/age", "Accept: application/json\r\n", "200", "43"),
        ("/name", "ACCEPT: application/json\r\n", "200", "{\"first\":\"John\",\"second\":\"Doe\"}"),
        ("/phones/00", "", "404", "Resource not found: /phones/00."),
        ("/phones/2", "", "404", "Resource not found: /phones/2."),
        ("/nothing", "", "404", "Resource not found: /nothing."),
        ("/name/first/x", "", "404", "Resource not found: /name/first/x."),
        ("http://", "", "400", "Invalid URI."), ("name", "", "400", "Invalid URI."),
    ])
    func get(path: String, header: String, status: String, body: String) throws {
        let response = try Guest(Self.text).ask("GET \(path) HTTP/1.1\r\nHost: a\r\n\(header)\r\n")
        #expect(self.status(response) == status && self.body(response) == body, "\(response)")
    }

    @Test(arguments: [
        ("PUT /latest/api/token HTTP/1.1\r\n\r\n", "405", "Not allowed HTTP method."),
        ("POST / HTTP/1.0\r\n\r\n", "405", "Not allowed HTTP method."),
        ("GET /\r\n\r\n", "400", "Invalid request line."), ("GET / HTTP/2\r\n\r\n", "400", "Invalid request line."),
        ("GET / HTTP/1.1\r\nno colon\r\n\r\n", "400", "Invalid header."),
        ("GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", "400", "Invalid Content-Length."),
        ("GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", "400", "Transfer-Encoding is not supported."),
    ])
    func refusals(request: String, status: String, body: String) throws {
        let response = try Guest(Self.text).ask(request)
        #expect(self.status(response) == status && self.body(response) == body, "\(response)")
    }

    @Test(arguments: ["X-metadata-token", "X-aws-ec2-metadata-token"]) func sessions(header: String) throws {
        let guest = try Guest(Self.text, version: .v2)
        func put(_ words: String, path: String = "/latest/api/token") throws -> String {
            try guest.ask("PUT \(path) HTTP/1.1\r\n\(words)\r\n")
        }
        let ttl = header + "-ttl-seconds: "
        let response = try put(ttl + "60\r\n")
        #expect(status(response) == "200" && response.contains { $0 == "6" })
        let token = body(response)
        #expect(token.utf8.count == 64)
        func get(_ token: String?) throws -> String {
            try guest.ask("GET /name/first HTTP/1.1\r\n\(token.map { "\(header): \($0)\r\n" } ?? "")\r\n")
        }
        #expect(try body(get(token)) == "John")
        #expect(
            try get(nil).hasSuffix(
                "\r\n\r\nNo MMDS token provided. Use `X-metadata-token` header to specify the session token."))
        #expect(try status(get(nil)) == "401" && status(get("x")) == "401")
        #expect(try body(get("x")) == "MMDS token not valid.")
        guest.now += 60_000
        #expect(try status(get(token)) == "401")
        for value in ["0", "21601", "-1", "4294967296", "a", ""] {
            #expect(
                try body(put(ttl + value + "\r\n"))
                    == "Invalid time to live value provided for token: \(value). Please provide a value between 1 and 21600."
            )
        }
        #expect(try status(put(ttl + "21600\r\n")) == "200" && status(put(ttl + "1\r\n")) == "200")
        #expect(try status(put("")) == "400")
        #expect(try status(put(ttl + "1\r\nX-Forwarded-For: a\r\n")) == "400")
        #expect(try body(put(ttl + "1\r\n", path: "/token")) == "Resource not found: /token.")
        let other = try guest.ask("DELETE / HTTP/1.1\r\n\r\n")
        #expect(status(other) == "405" && other.split(separator: "\r\n").contains("Allow: GET, PUT"))
    }

    /// Requests on one connection, several in one segment, and one in many.
    @Test func aConnectionIsKept() throws {
        let guest = try Guest(Self.text), stream = try guest.open()
        let request = "GET /name/first HTTP/1.1\r\n\r\n"
        for _ in 0..<3 {
            stream.write(request)
            #expect(try body(stream.read()) == "John")
        }
        stream.write(request + request)
        #expect(try stream.read().split(separator: "\r\n").count { $0 == "HTTP/1.1 200 OK" } >= 1)
        for byte in request { stream.write(String(byte)) }
        #expect(try body(stream.read()).hasSuffix("John") && !stream.isClosedByPeer)
        stream.write("GET /age HTTP/1.1\r\nConnection: close\r\n\r\n")
        #expect(try status(stream.read()) == "501")
        #expect(stream.isClosedByPeer)
        stream.close()
        #expect(guest.connectionCount == 0)
    }
}
