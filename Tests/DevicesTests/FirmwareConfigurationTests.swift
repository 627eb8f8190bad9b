// SPDX-License-Identifier: Apache-2.0

@testable import Devices
import GuestMemory
import Linux
import TestSupport
import Testing

/// The configuration device as firmware uses it, and as a guest may misuse it.
@Suite(.timed) struct FirmwareConfigurationTests {
    private let memory: GuestMemory
    private let ports: FirmwareConfigurationPorts

    init() throws {
        var contents = FirmwareConfiguration()
        contents.add(UInt16(3), as: FirmwareConfiguration.Item.cpus)
        contents.add(file: "etc/first", [1, 2, 3, 4, 5])
        contents.add(file: "etc/second", [])
        memory = try GuestMemory(size: 4 << 20)
        ports = FirmwareConfigurationPorts(contents, memory.ram)
    }

    private func bytes(of item: UInt16, _ count: Int) -> [UInt8] {
        ports.write(0, size: 2, value: UInt32(item))
        return (0..<count).map { _ in UInt8(ports.read(1, size: 1)) }
    }

    /// Starts a transfer whose command is at 0x1000; returns what control has afterwards.
    private func transfer(
        _ control: UInt32, _ length: UInt32, to address: UInt64, at command: UInt64 = 0x1000
    ) throws
        -> UInt32
    {
        try memory.ram.write(control.byteSwapped, at: GuestAddress(command))
        try memory.ram.write(length.byteSwapped, at: GuestAddress(command + 4))
        try memory.ram.write(address.byteSwapped, at: GuestAddress(command + 8))
        ports.write(4, size: 4, value: 0)
        ports.write(8, size: 4, value: UInt32(command).byteSwapped)
        let slice = try #require(memory.ram.slice(at: GuestAddress(command), count: 4))
        return slice.load32(0).byteSwapped
    }

    @Test func itemsAreReadByteByByteAndEndInZeros() {
        #expect(bytes(of: 0, 5) == Array("QEMU".utf8) + [0])
        #expect(bytes(of: 1, 4) == [3, 0, 0, 0])
        #expect(bytes(of: 5, 3) == [3, 0, 0])
        #expect(bytes(of: 0x1234, 2) == [0, 0])
        #expect(ports.read(4, size: 4) == 0x554d_4551 && ports.read(8, size: 4) == 0x4746_4320)
        #expect(ports.read(2, size: 1) == .max && ports.read(0, size: 2) == .max)
    }

    @Test func theDirectoryNamesTheFiles() {
        let name = Array("etc/first".utf8)
        let directory = bytes(of: 0x19, 4 + 2 * 64)
        #expect(Array(directory[..<4]) == [0, 0, 0, 2])
        #expect(Array(directory[4..<12]) == [0, 0, 0, 5, 0, 0x20, 0, 0])
        #expect(Array(directory[12..<12 + name.count + 1]) == name + [0])
        #expect(Array(directory[68..<76]) == [0, 0, 0, 0, 0, 0x21, 0, 0])
        #expect(bytes(of: 0x20, 6) == [1, 2, 3, 4, 5, 0])
    }

    @Test func transfersSelectReadAndSkip() throws {
        #expect(try transfer(0x20 << 16 | 8 | 2, 3, to: 0x2000) == 0)
        #expect(try memory.ram.readBytes(at: GuestAddress(0x2000), count: 4) == [1, 2, 3, 0])
        #expect(try transfer(4, 1, to: 0) == 0)
        try memory.ram.fill(at: GuestAddress(0x2000), count: 16, with: 0xff)
        #expect(try transfer(2, 4, to: 0x2000) == 0)
        #expect(try memory.ram.readBytes(at: GuestAddress(0x2000), count: 5) == [5, 0, 0, 0, 0xff])
    }

    /// What a guest may write, but firmware does not.
    @Test func impossibleTransfersHaveTheErrorBit() throws {
        let read: UInt32 = 0x20 << 16 | 8 | 2
        #expect(try transfer(read, 5, to: 4 << 20) == 1, "not RAM")
        #expect(try transfer(read, 5, to: 4 << 20 - 2) == 1, "beyond its end")
        #expect(try transfer(read, 5, to: .max - 1) == 1, "an address that wraps")
        #expect(try transfer(read, .max, to: 0x2000) == 1, "more zeros than anybody reads")
        #expect(try transfer(0x20 << 16 | 8 | 16, 5, to: 0x2000) == 1, "a write")
        #expect(try memory.ram.readBytes(at: GuestAddress(0x2000), count: 8) == [UInt8](repeating: 0, count: 8))
        // Skipped to its end and beyond, again and again.
        for _ in 0..<4 { #expect(try transfer(4, .max, to: 0) == 0) }
        #expect(try transfer(2, 2, to: 0x2000) == 0)
        // Commands that are not in RAM.
        for address in [4 << 20, 4 << 20 - 8, UInt32.max] as [UInt32] {
            ports.write(4, size: 4, value: .max)
            ports.write(8, size: 4, value: address.byteSwapped)
        }
        #expect(bytes(of: 0x20, 2) == [1, 2])
    }

    @Test func anyAccessesLeaveTheDeviceUsable() throws {
        var generator = SeededGenerator(seed: 7)
        for _ in 0..<20_000 {
            let offset = UInt16.random(in: 0...15, using: &generator)
            let size = [1, 2, 4].randomElement(using: &generator) ?? 1
            // Addresses within RAM most of the time, where a transfer finds what others have left.
            let value = UInt32.random(in: 0...0x3f_ffff, using: &generator).byteSwapped
            if Bool.random(using: &generator) { ports.write(offset, size: size, value: value) }
            _ = ports.read(offset, size: size)
        }
        #expect(bytes(of: 0x20, 6) == [1, 2, 3, 4, 5, 0])
    }

    @Test func theDebugPortReportsLines() {
        let lines = Guarded<[String]>([])
        let port = FirmwareDebugPort { line in lines.withLock { $0.append(line) } }
        #expect(port.read(0, size: 1) == 0xe9)
        for byte in "Hello\r\n\n\u{1b}x\n".utf8 { port.write(0, size: 1, value: UInt32(byte)) }
        let first = lines.withLock { $0 }
        #expect(first.count == 2 && first[0] == "Hello" && !first[1].unicodeScalars.contains("\u{1b}"))
        for _ in 0..<FirmwareDebugPort.limit + 1000 { port.write(0, size: 1, value: 0x61) }
        let all = lines.withLock { $0 }
        #expect(all.allSatisfy { $0.utf8.count <= FirmwareDebugPort.longestLine })
        #expect(all.last?.hasSuffix("the rest is not reported") == true)
        #expect(all.count < FirmwareDebugPort.limit / FirmwareDebugPort.longestLine + 5)
    }

    @Test func theResetRegisterResetsOnRequestOnly() {
        let requests = Guarded<[MachineRequest]>([])
        let port = ResetControlPort { request in requests.withLock { $0.append(request) } }
        port.write(0, size: 1, value: 2)
        port.write(0, size: 4, value: 6)
        #expect(requests.withLock { $0.isEmpty })
        port.write(0, size: 1, value: 6)
        #expect(requests.withLock { $0 } == [.reset])
    }
}
