// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import Synchronization
import TestSupport
import Testing

/// Opening an image may wait for another process, or compute for minutes: it can be cancelled.
@Suite(.timed) struct InterruptedOpeningTests {
    private let directory = TemporaryDirectory(inMemory: true)

    /// Gives up when it is asked for the third time.
    private func impatient() -> @Sendable () -> Bool {
        let asked = Counter()
        return { asked.count.add(1, ordering: .relaxed).newValue >= 3 }
    }

    private final class Counter: Sendable { let count = Atomic<Int>(0) }

    private func isGivenUp(_ body: () throws -> Void) -> Bool {
        do { try body() } catch DiskImageError.openingInterrupted { return true } catch { return false }
        return false
    }

    @Test func aNamedPipeWithoutAKey() throws {
        let path = directory.file("key")
        #expect(mkfifo(path, 0o600) == 0)
        #expect(isGivenUp { _ = try DiskKey(.file(path), isInterrupted: impatient()) })
        // A descriptor that was passed on, and to which nobody writes.
        var ends: [Int32] = [0, 0]
        #expect(pipe(&ends) == 0)
        defer { close(ends[1]) }
        #expect(isGivenUp { _ = try DiskKey(.descriptor(ends[0]), isInterrupted: impatient()) })
    }

    /// Who waits for a key hears of it, once.
    @Test func aKeyThatDoesNotComeIsReported() throws {
        var ends: [Int32] = [0, 0]
        #expect(pipe(&ends) == 0)
        defer { close(ends[1]) }
        let asked = Counter()
        var reports: [(String, Int)] = []
        #expect(
            isGivenUp {
                _ = try DiskKey(
                    .descriptor(ends[0]),
                    isInterrupted: { asked.count.add(1, ordering: .relaxed).newValue > 25 },
                    report: { reports.append(($0, asked.count.load(ordering: .relaxed))) })
            })
        #expect(
            reports.map(\.0) == ["waiting for the key from descriptor \(ends[0]), or its end"] && reports[0].1 == 10)
    }

    /// A key that comes late, and in two pieces, is a key.
    @Test func aNamedPipeWithAKey() throws {
        let path = directory.file("key")
        #expect(mkfifo(path, 0o600) == 0)
        let writer = try Thread.start(name: "writer") {
            usleep(200_000)
            guard let file = try? FileDescriptor.open(path, O_WRONLY) else { return }
            _ = "late ".withCString { Glibc.write(file.rawValue, $0, 5) }
            usleep(200_000)
            _ = "key".withCString { Glibc.write(file.rawValue, $0, 3) }
        }
        let key = try DiskKey(.file(path), isInterrupted: { false })
        writer.join()
        #expect(key.password.withBytes { $0.array } == Array("late key".utf8))
    }

    /// An image says how often its key is hashed: this one says 100 million times.
    @Test func aKeyThatTakesMinutes() throws {
        let encrypted = try Encrypted(directory)
        let path = try encrypted.create("disk.qcow2", size: 1 << 20)
        var file = try directory.read("disk.qcow2")
        file.replaceSubrange(65536 + 212..<65536 + 216, with: [5, 0xf5, 0xe1, 0])
        try directory.write("disk.qcow2", file)
        let isInterrupted = impatient()
        var options = DiskImageOptions(readOnly: true, locking: false)
        options.keys = [try DiskKey(.file(encrypted.keyFile), isInterrupted: isInterrupted)]
        #expect(isGivenUp { _ = try DiskImage(path: path, options: options) })
    }

    @Test func aServerThatSaysNothing() throws {
        let path = directory.file("silent")
        let listener = FileDescriptor(owning: socket(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0))
        let address = try #require(SocketAddress(unixPath: path)), number = listener.rawValue
        #expect(address.withAddress { bind(number, $0, $1) } == 0)
        #expect(listen(number, 16) == 0)
        var options = DiskImageOptions(readOnly: true)
        options.isInterrupted = impatient()
        #expect(isGivenUp { _ = try DiskImage(path: "nbd+unix:///?socket=\(path)", options: options) })
    }

    /// The first request, for the bytes that a format would be known by, is not answered.
    @Test func aServerThatFallsSilent() throws {
        let server = try ScriptedNBDServer(directory, [UInt8](repeating: 0, count: 1 << 20)) { _, request in
            request == .read ? .ignore : .answer
        }
        defer { server.stop() }
        var options = DiskImageOptions(readOnly: true)
        let isInterrupted = impatient()
        options.isInterrupted = isInterrupted
        #expect(throws: DiskImageError.self) { _ = try DiskImage(path: server.address, options: options) }
        #expect(isInterrupted())
    }

    /// After the opening nobody is asked: a request of a machine waits for as long as it has to.
    @Test func aMachinesRequestsAreNotInterrupted() throws {
        let server = try ScriptedNBDServer(directory, [UInt8](repeating: 7, count: 1 << 20)) { _, _ in .answer }
        defer { server.stop() }
        let flag = Flag()
        var options = DiskImageOptions(format: .raw, readOnly: true)
        options.isInterrupted = { flag.isSet.load(ordering: .relaxed) }
        var engine = try DiskEngine(DiskImage(path: server.address, options: options))
        flag.isSet.store(true, ordering: .relaxed)
        // Nor when a connection that was lost is replaced.
        #expect(engine.image.remote?.isInterrupted == nil)
        let contents = try engine.readAll()
        #expect(contents == [UInt8](repeating: 7, count: 1 << 20))
    }

    private final class Flag: Sendable { let isSet = Atomic<Bool>(false) }
}
