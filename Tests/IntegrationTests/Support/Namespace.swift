// SPDX-License-Identifier: Apache-2.0

import Glibc
import HostNetwork
import Linux
import TestSupport

/// A network namespace of a test's own. It has no name: it ends with the object and the processes in it, however those
/// end.
final class Namespace {
    private let namespace: Holder<NetworkNamespace>

    init() throws {
        namespace = try onOwnThread {
            try NetworkNamespace.enterNew()
            return Holder(try NetworkNamespace.current())
        }
        try shell("ip link set lo up")
    }

    /// Runs `body` on a thread in the namespace.
    func run<Value>(_ body: @escaping () throws -> Value) throws -> Value {
        try onOwnThread { [self] in
            try namespace.value.enter()
            return try body()
        }
    }

    /// Runs a script in the namespace; a failing command of it is the test's failure.
    /// - Returns: what it printed.
    @discardableResult
    func shell(_ script: String) throws -> String { try IntegrationTests.shell(script, in: self) }

    /// Whether an interface of that name is there.
    func hasLink(_ name: String) throws -> Bool {
        try run { try RouteNetlink().link(named: InterfaceName(name)) != nil }
    }

    /// The interface of that name.
    func link(_ name: String) throws -> Link {
        guard let link = try run({ try RouteNetlink().link(named: InterfaceName(name)) }) else {
            throw TestFailure("there is no \(name)")
        }
        return link
    }

    /// The names of all interfaces but `lo`.
    func linkNames() throws -> [String] {
        try run { try RouteNetlink().links().map(\.name.text).filter { $0 != "lo" }.sorted() }
    }
}

/// Runs a script; a failing command of it is the test's failure.
/// - Returns: what it printed.
@discardableResult
func shell(_ script: String, in namespace: Namespace? = nil) throws -> String {
    let program = try Program(["sh", "-euc", script], in: namespace)
    guard try program.waitForEnd() == .status(0) else { throw TestFailure(program.story) }
    return program.output.text
}

/// Runs `body` on a thread that ends afterwards, for what a thread cannot take back.
private func onOwnThread<Value>(_ body: @escaping () throws -> Value) throws -> Value {
    let task = OwnThreadTask(body)
    // The join orders what the thread wrote before what is read here.
    try Thread.start(name: "test", stackSize: 1 << 20) { task.run() }.join()
    return try task.result!.get()
}

private final class OwnThreadTask<Value>: @unchecked Sendable {
    private let body: () throws -> Value
    private(set) var result: Result<Value, any Error>?
    init(_ body: @escaping () throws -> Value) { self.body = body }
    func run() { result = Result(catching: body) }
}

/// Keeps a value that cannot be copied, for a closure.
final class Holder<Value: ~Copyable> {
    let value: Value
    init(_ value: consuming Value) { self.value = value }
}
