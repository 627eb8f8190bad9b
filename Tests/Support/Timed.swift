// SPDX-License-Identifier: Apache-2.0

import Glibc
public import Testing

/// Notes how long each test of a suite takes, from its own first line to its last, and runs it on the ``TestThreads``
/// if there are some.
///
/// The file that `SWKVM_TEST_TIMES` names gets a line for each: milliseconds, then the source file and the test.
/// `make test` shows the slowest. The times that the test runner prints begin when a test is queued.
public struct Timed: SuiteTrait, TestTrait, TestScoping {
    public var isRecursive: Bool { true }

    public func scopeProvider(for test: Test, testCase: Test.Case?) -> Timed? {
        // A suite is as long as its tests, and a test with arguments as all of its cases.
        testCase == nil || Self.file == nil && TestThreads.shared == nil ? nil : self
    }

    public func provideScope(
        for test: Test, testCase: Test.Case?, performing function: @Sendable () async throws -> Void
    ) async throws {
        try await withTaskExecutorPreference(TestThreads.shared) {
            // From here on it has a thread of its own.
            let start = ContinuousClock.now
            defer { Self.note("\(start.duration(to: .now).milliseconds) \(test.sourceLocation.fileID) \(test.name)\n") }
            try await function()
        }
    }

    private static let file: Int32? = {
        guard let path = unsafe getenv("SWKVM_TEST_TIMES") else { return nil }
        // The path is the environment's.
        let file = unsafe open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0o600)
        return file < 0 ? nil : file
    }()

    private static func note(_ line: String) {
        guard let file else { return }
        // One call for a line: those of other threads do not come between. The best is done.
        unsafe Array(line.utf8).withUnsafeBytes { _ = unsafe write(file, $0.baseAddress, $0.count) }
    }
}

extension Duration {
    fileprivate var milliseconds: Int64 { components.seconds * 1000 + components.attoseconds / 1_000_000_000_000_000 }
}

extension Trait where Self == Timed {
    /// Notes the time of each test.
    public static var timed: Self { Timed() }
}
