// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Linux
import TestSupport
import Testing

/// A race, which `make tsan` expects to be reported before it believes that there is none elsewhere. It is built with
/// the others, and run there alone.
@Suite(.timed, .enabled(if: environment("SWKVM_PLANTED_RACE") == 1, "it has a race on purpose, for make tsan"))
struct PlantedRaceTests {
    let directory = TemporaryDirectory(inMemory: true)

    @Test func aCounterOfTheImageIsReadWithoutItsLock() throws {
        let path = try directory.write("disk.raw", [UInt8](repeating: 0, count: 4096))
        let shared = try SharedImage(DiskImage(path: path, options: DiskImageOptions(format: .raw, locking: false)))
        let thread = try Linux.Thread.start(name: "engine", stackSize: 8 << 20) {
            do {
                var engine = try DiskEngine(shared, depth: 4, usesRing: false)
                for _ in 0..<16 { try engine.perform(.flush) }
            } catch {
                Issue.record(error)
            }
        }
        // The engine counts its operations under the lock.
        for _ in 0..<1_000_000 where shared.sequence < 8 { Thread.yield() }
        thread.join()
        #expect(shared.sequence == 16)
    }
}
