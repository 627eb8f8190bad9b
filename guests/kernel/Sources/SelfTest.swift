// SPDX-License-Identifier: Apache-2.0

/// The self-tests: a line for each, `ok N - name` or `not ok N - name # why`, `1..N` at the end, and the number of
/// failures as the machine's exit status.
final class SelfTest {
    private var number = 0
    private var failures = 0
    let boot: BootInformation

    private init(_ boot: BootInformation) { self.boot = boot }

    static func run(_ names: Text, _ boot: BootInformation) -> Never {
        let test = SelfTest(boot)
        let words = names.split(UInt8(ascii: ","))
        func wanted(_ name: StaticString) -> Bool { words.contains { $0.equals(name) || $0 == "all" } }
        for word in words where !known(word) { test.fail("\(word)", "no such test") }
        if wanted("memory") { test.memory() }
        if wanted("cpus") { test.cpus() }
        if wanted("timer") { test.timer() }
        if wanted("irq") { test.interruptLines() }
        if wanted("disk") { test.disks() }
        if wanted("net") { test.network() }
        if wanted("rng") { test.entropy(isNamed: words.contains { $0.equals("rng") }) }
        if wanted("hostile") { test.hostile() }
        Console.print("1..\(test.number)")
        Power.exit(test.failures)
    }

    private static func known(_ word: Text) -> Bool {
        word == "all" || word == "memory" || word == "cpus" || word == "timer" || word == "irq" || word == "disk"
            || word == "net"
            || word == "rng" || word == "hostile"
    }

    /// Runs one test, which fails if `body` throws.
    func check(_ name: Text, _ body: () throws(Failure) -> Void) {
        do {
            try body()
            number += 1
            Console.print("ok \(number) - \(name)")
        } catch {
            fail(name, error.reason)
        }
    }

    func fail(_ name: Text, _ reason: Text) {
        number += 1
        failures += 1
        Console.print("not ok \(number) - \(name) # \(reason)")
    }

    func skip(_ name: Text, _ reason: Text) {
        number += 1
        Console.print("ok \(number) - \(name) # SKIP \(reason)")
    }
}

/// Throws unless `condition` holds.
func expect(_ condition: Bool, _ reason: @autoclosure () -> Text) throws(Failure) {
    if !condition { throw Failure(reason()) }
}
