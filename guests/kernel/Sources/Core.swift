// SPDX-License-Identifier: Apache-2.0

// Declarations of instructions.S and entry.S: instructions, the services of ring 0, and the addresses of its tables.

@_extern(c) func readPort8(_ port: UInt16) -> UInt8
@_extern(c) func writePort8(_ port: UInt16, _ value: UInt8)

/// The time-stamp counter.
@_extern(c) func timestamp() -> UInt64

/// Orders all earlier memory accesses before all later ones, for the CPU and for the compiler.
@_extern(c) func fence()

/// Tells the CPU that this is a spin loop.
@_extern(c) func spinPause()

/// Sleeps until an interrupt is pending for this CPU, or returns immediately if one is.
@_extern(c) func idle()

@_extern(c) func writeMSR(_ register: UInt32, _ value: UInt64)

/// Flushes the TLB.
@_extern(c) func reloadPageTables()

/// Causes a triple fault: the machine resets, or the monitor ends it.
@_extern(c) func crashByTripleFault()

/// `popcnt` in ring 0, which KVM's instruction emulator does not support. Harmless if ring 0 runs natively.
@_extern(c) func crashByInternalError()

@_extern(c, "exchange") private func exchangeWord(_ address: UInt64, _ value: UInt64) -> UInt64
@_extern(c, "fetchAdd") private func fetchAddWord(_ address: UInt64, _ value: UInt64) -> UInt64
@_extern(c, "outputBytes") private func outputBytes(_ port: UInt16, _ address: UInt64, _ count: UInt64)
@_extern(c, "coreTableAddress") private func coreTableAddress() -> UInt64
@_extern(c, "processorIdentification")
private func processorIdentification(_ leaf: UInt32, _ subleaf: UInt32, _ words: UInt64)

extension Address {
    /// Stores `value` and returns the old value, atomically.
    func exchange(_ value: UInt64) -> UInt64 { exchangeWord(self.value, value) }

    /// Adds `value` and returns the old value, atomically.
    @discardableResult
    func fetchAdd(_ value: UInt64) -> UInt64 { fetchAddWord(self.value, value) }

    /// Writes `count` bytes from here to a port, in ring 0: if that is interpreted, an exit costs less there.
    func output(count: Int, to port: UInt16) { outputBytes(port, value, UInt64(count)) }
}

/// One leaf of `cpuid` in ring 0: in ring 3 some hosts show their own CPU instead of the virtual one.
struct CPUID {
    let eax, ebx, ecx, edx: UInt32

    init(_ leaf: UInt32, _ subleaf: UInt32 = 0) {
        var words: (UInt32, UInt32, UInt32, UInt32) = (0, 0, 0, 0)
        unsafe withUnsafeMutableBytes(of: &words) { buffer in
            // Four words are written to the tuple within the closure.
            processorIdentification(leaf, subleaf, UInt64(UInt(bitPattern: buffer.baseAddress)))
        }
        (eax, ebx, ecx, edx) = words
    }
}

/// The tables of entry.S.
enum Core {
    static var imageEnd: Address { entry(0) }
    static var gdt: Address { entry(1) }
    static var bootTSS: Address { entry(2) }
    static var bootBlock: Address { entry(3) }
    static var pageDirectoryPointers: Address { entry(4) }
    static var trampolineStart: Address { entry(5) }
    static var trampolineEnd: Address { entry(6) }
    static var processorMain: Address { entry(7) }
    static var processorBlocks: Address { entry(8) }

    // As in entry.S.
    static let faultStackOffset: UInt64 = 0x200
    static let ring0StackOffset: UInt64 = 0x600
    static let pendingOffset: UInt64 = 0x700
    static let frameOffset: UInt64 = 0x740
    static let taskOffset: UInt64 = 0x768
    static let userCode: UInt64 = 0x33
    static let userData: UInt64 = 0x2b
    static let firstTSSSelector = 0x40
    static let tssSize: UInt64 = 112
    static let tssBitmap: UInt64 = 0x7000
    static let tssLimit: UInt64 = 0x8fff
    static let maximumCPUs = 255
    static let trampolineAddress = Address(0x8000)

    private static func entry(_ index: UInt64) -> Address {
        Address((Address(coreTableAddress()) + index * 8).load() as UInt64)
    }
}
