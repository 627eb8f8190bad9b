// SPDX-License-Identifier: Apache-2.0

import Essentials
import Foundation
import TestSupport
import Testing

@testable import swkvm

/// What the release binary has in the place of FoundationEssentials.
@Suite(.timed) struct EssentialsTests {
    /// Any document.
    private indirect enum Document: Codable, Equatable {
        case null, bool(Bool), number(Double), text(String), array([Document]), object([String: Document])

        init(from decoder: any Decoder) throws {
            let container = try decoder.singleValueContainer()
            if container.decodeNil() {
                self = .null
            } else if let value = try? container.decode(Bool.self) {
                self = .bool(value)
            } else if let value = try? container.decode(Double.self) {
                self = .number(value)
            } else if let value = try? container.decode(String.self) {
                self = .text(value)
            } else if let value = try? container.decode([Document].self) {
                self = .array(value)
            } else {
                self = .object(try container.decode([String: Document].self))
            }
        }

        func encode(to encoder: any Encoder) throws {
            var container = encoder.singleValueContainer()
            switch self {
            case .null: try container.encodeNil()
            case .bool(let value): try container.encode(value)
            case .number(let value): try container.encode(value)
            case .text(let value): try container.encode(value)
            case .array(let value): try container.encode(value)
            case .object(let value): try container.encode(value)
            }
        }
    }

    private func encoded(
        _ value: some Encodable, _ options: Essentials.JSONEncoder.OutputFormatting = []
    ) throws -> String {
        let encoder = Essentials.JSONEncoder()
        encoder.outputFormatting = options
        return try #require(String(data: encoder.encode(value), encoding: .utf8))
    }

    /// The description of all commands, from which the manual pages are made.
    @Test func theDescriptionOfTheCommands() throws {
        let text = Command._dumpHelp()
        let document = try JSONDecoder().decode(Document.self, from: Foundation.Data(text.utf8))
        for options: Essentials.JSONEncoder.OutputFormatting in [[], .prettyPrinted, [.prettyPrinted, .sortedKeys]] {
            let again = try encoded(document, options)
            #expect(try JSONDecoder().decode(Document.self, from: Foundation.Data(again.utf8)) == document)
        }
    }

    @Test func values() throws {
        struct Values: Encodable {
            enum Kind: String, Encodable { case one }
            var absent: Int?
            var kind = Kind.one
            var text = "\"\\\n\r\t\u{1}é/"
            var numbers: [Int64] = [-1, .max]
            var isEmpty = [Int]()
            var fraction: Float = 1.5
        }
        #expect(
            try encoded(Values())
                == #"{"fraction":1.5,"isEmpty":[],"kind":"one","numbers":[-1,9223372036854775807],"#
                + #""text":"\"\\\n\r\t\u0001é/"}"#)
        let lines = try encoded(["b": [1], "a": []], [.prettyPrinted, .sortedKeys])
        #expect(lines == "{\n  \"a\" : [],\n  \"b\" : [\n    1\n  ]\n}")
        #expect(throws: EncodingError.self) { try encoded([Double.nan]) }
    }

    @Test func errors() {
        struct Plain: Error {}
        struct Described: Essentials.LocalizedError { var errorDescription: String? { "described" } }
        struct Silent: Essentials.LocalizedError {}
        func description(_ error: any Error) -> String? { (error as? any Essentials.LocalizedError)?.errorDescription }
        #expect(description(Plain()) == nil && description(Described()) == "described" && description(Silent()) == nil)
    }
}
