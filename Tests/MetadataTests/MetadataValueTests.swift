// SPDX-License-Identifier: Apache-2.0

@testable import Metadata
import TestSupport
import Testing

@Suite(.timed) struct MetadataValueTests {
    private func value(_ text: String) throws -> MetadataValue { try MetadataValue(parsing: Array(text.utf8)) }
    private func json(_ value: MetadataValue) -> String { String(decoding: value.json, as: UTF8.self) }

    @Test(arguments: [
        ("null", "null"), (" [ 1 , -0.5e+3,true ] ", "[1,-0.5e+3,true]"),
        ("{\"b\":{},\"a\":[]}", "{\"a\":[],\"b\":{}}"),
        ("\"\\u00e4\\ud83d\\ude00\\n\\/\\u0001\"", "\"ä😀\\n/\\u0001\""), ("{\"a\":1,\"a\":2}", "{\"a\":2}"), ("0", "0"),
    ])
    func texts(text: String, printed: String) throws {
        #expect(try json(value(text)) == printed)
        #expect(try value(printed) == value(text))
    }

    @Test(arguments: [
        "", "{", "[1,]", "{\"a\":1,}", "01", "1.", "-", "+1", "1e", "nul", "\"\\x\"", "\"\\ud800\"",
        "\"\\ud800\\u0041\"",
        "\"\n\"", "\"a", "{a:1}", "[1] 2", "'a'", "{\"a\" 1}", "NaN", "\"\\u12\"", "// a\n1",
    ])
    func noTexts(text: String) {
        #expect(throws: MetadataProblem.self) { try value(text) }
    }

    @Test func whatIsNoUTF8OrTooDeep() throws {
        #expect(throws: MetadataProblem.self) { try MetadataValue(parsing: [0x22, 0xff, 0x22]) }
        func nested(_ depth: Int) -> String {
            String(repeating: "[", count: depth) + String(repeating: "]", count: depth)
        }
        _ = try value(nested(127))
        #expect(throws: MetadataProblem.self) { try value(nested(128)) }
        #expect(throws: MetadataProblem.self) { try value(String(repeating: "[", count: 50_000)) }
    }

    /// The examples of RFC 7396, appendix A.
    @Test(arguments: [
        ("{\"a\":\"b\"}", "{\"a\":\"c\"}", "{\"a\":\"c\"}"),
        ("{\"a\":\"b\"}", "{\"b\":\"c\"}", "{\"a\":\"b\",\"b\":\"c\"}"),
        ("{\"a\":\"b\"}", "{\"a\":null}", "{}"), ("{\"a\":[\"b\"]}", "{\"a\":\"c\"}", "{\"a\":\"c\"}"),
        ("{\"a\":\"c\"}", "{\"a\":[\"b\"]}", "{\"a\":[\"b\"]}"),
        ("{\"a\":{\"b\":\"c\"}}", "{\"a\":{\"b\":\"d\",\"c\":null}}", "{\"a\":{\"b\":\"d\"}}"),
        ("[\"a\",\"b\"]", "[\"c\",\"d\"]", "[\"c\",\"d\"]"), ("{\"e\":null}", "{\"a\":1}", "{\"a\":1,\"e\":null}"),
        ("[1,2]", "{\"a\":\"b\",\"c\":null}", "{\"a\":\"b\"}"),
        ("{}", "{\"a\":{\"bb\":{\"ccc\":null}}}", "{\"a\":{\"bb\":{}}}"),
        ("{\"a\":\"foo\"}", "null", "null"),
    ])
    func patches(target: String, patch: String, result: String) throws {
        var merged = try value(target)
        merged.merge(try value(patch))
        #expect(json(merged) == result)
    }

    @Test func theStoreHasALimit() throws {
        let store = MetadataStore(limit: 20)
        #expect(store.value == .null)
        #expect(throws: MetadataProblem.notInitialized) { try store.patch(value("{}")) }
        try store.put(value("{\"a\":\"0123456789\"}"))
        #expect(throws: MetadataProblem.tooLong(limit: 20)) { try store.patch(value("{\"b\":1}")) }
        #expect(throws: MetadataProblem.tooLong(limit: 20)) { try store.put(value("\"01234567890123456789\"")) }
        #expect(json(store.value) == "{\"a\":\"0123456789\"}")
        try store.patch(value("{\"a\":null,\"b\":1}"))
        #expect(json(store.value) == "{\"b\":1}")
    }

    /// A guest that begins sessions without end has the last ones.
    @Test func tokensAreBounded() {
        let store = MetadataStore(version: .v2)
        let first = store.makeToken(lifetime: 1, now: 0)
        #expect(store.isValid(first, now: 999) && !store.isValid(first, now: 1000) && !store.isValid("", now: 0))
        let tokens = (0..<300).map { store.makeToken(lifetime: 60, now: UInt64($0)) }
        #expect(Set(tokens).count == 300 && tokens.allSatisfy { $0.utf8.count == 64 })
        #expect(tokens.count { store.isValid($0, now: 400) } == 256 && store.isValid(tokens[299], now: 400))
    }
}
