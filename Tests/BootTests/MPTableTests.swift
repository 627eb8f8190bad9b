// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

@testable import Boot

@Suite(.timed) struct MPTableTests {
    @Test(arguments: [1, 2, 8, 32, 33, 1024]) func sumsAndSizesHold(cpus: Int) throws {
        let bytes = MPTable(localAPICIDs: (0..<UInt32(cpus)).map { $0 }).bytes
        // The last KiB of base memory is all there is.
        #expect(bytes.count <= 1024)
        #expect(bytes[..<4].elementsEqual("_MP_".utf8))
        #expect(bytes[..<16].reduce(0, &+) == 0)
        #expect(try #require(bytes.load(UInt32.self, at: 4)) == 0x9_fc10)
        let table = Array(bytes[16...])
        #expect(table[..<4].elementsEqual("PCMP".utf8))
        #expect(try #require(table.load(UInt16.self, at: 4)) == table.count)
        #expect(table.reduce(0, &+) == 0)
        // The entries' sizes by their type add up to the table, and there are as many as it says.
        var offset = 44, count = 0, processors = 0
        while offset < table.count {
            if table[offset] == 0 { processors += 1 }
            offset += table[offset] == 0 ? 20 : 8
            count += 1
        }
        #expect(offset == table.count)
        #expect(try #require(table.load(UInt16.self, at: 34)) == count)
        #expect(processors == min(cpus, 32))
    }
}
