// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

@testable import Inventory

@Suite(.timed) struct MachineNameTests {
    @Test(arguments: ["web", "a", "0", "web-1.example_x", String(repeating: "x", count: 64)]) func namesThatAre(
        _ text: String
    ) throws {
        #expect(try MachineName(text).text == text)
    }

    @Test(arguments: [
        "", ".", "..", ".web", "-web", "_web", "a/b", "a b", "w\u{e9}b", "web\n", String(repeating: "x", count: 65),
    ]) func namesThatAreNot(_ text: String) {
        #expect(throws: InventoryError.badName(text)) { try MachineName(text) }
    }
}
