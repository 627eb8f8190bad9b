// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

@testable import Inventory

@Suite(.timed) struct DirectoriesTests {
    private func directories(_ user: UInt32, _ environment: [String: String]) throws -> Directories {
        try Directories(user: user) { environment[$0] }
    }

    @Test func rootHasThoseOfTheSystem() throws {
        let expected = Directories(
            definitions: "/etc/swkvm/machines", data: "/var/lib/swkvm/machines", runtime: "/run/swkvm")
        #expect(try directories(0, [:]) == expected)
        #expect(try directories(0, ["HOME": "/root", "XDG_DATA_HOME": "/x", "SWKVM_HOME": ""]) == expected)
    }

    @Test func othersHaveTheirOwn() throws {
        #expect(
            try directories(1000, ["HOME": "/home/a", "XDG_RUNTIME_DIR": "/run/user/1000"])
                == Directories(
                    definitions: "/home/a/.config/swkvm/machines", data: "/home/a/.local/share/swkvm/machines",
                    runtime: "/run/user/1000/swkvm"))
        #expect(
            try directories(1000, ["XDG_CONFIG_HOME": "/c", "XDG_DATA_HOME": "/d", "HOME": "relative"])
                == Directories(
                    definitions: "/c/swkvm/machines", data: "/d/swkvm/machines", runtime: "/d/swkvm/run"))
        // A relative path counts as unset.
        #expect(
            try directories(1000, ["HOME": "/h", "XDG_DATA_HOME": "d"]).data == "/h/.local/share/swkvm/machines")
        #expect(throws: InventoryError.noHome) { try directories(1000, [:]) }
        #expect(throws: InventoryError.noHome) { try directories(1000, ["HOME": "h"]) }
    }

    @Test func oneDirectoryForAll() throws {
        for user in [0, 1000] as [UInt32] {
            #expect(
                try directories(user, ["SWKVM_HOME": "/m", "HOME": "/h"])
                    == Directories(definitions: "/m/definitions", data: "/m/machines", runtime: "/m/run"))
            #expect(throws: InventoryError.noHome) { try directories(user, ["SWKVM_HOME": "m", "HOME": "/h"]) }
        }
    }
}
