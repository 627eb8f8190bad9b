/// Kernels of a few bytes, for what the bundled guest does not do.
enum TinyKernel {
    /// Disables interrupts and halts: it hears of no power button.
    static let deaf: [UInt8] = [0xfa, 0xf4, 0xeb, 0xfc]  // 1: cli; hlt; jmp 1b
    /// Runs in circles.
    static let busy: [UInt8] = [0xeb, 0xfe]
    /// Writes without end: mov dx, 0x3f8; mov al, 'x'; 1: out dx, al; jmp 1b
    static let talking: [UInt8] = [0x66, 0xba, 0xf8, 0x03, 0xb0, 0x78, 0xee, 0xeb, 0xfd]

    /// An ELF file whose one segment is `code`, at 2 MiB.
    /// - Parameters:
    ///   - machine: the ELF header's machine, 62 for x86-64.
    ///   - address: where the segment goes.
    ///   - memorySize: of the segment, at least the code's size.
    static func elf(_ code: [UInt8], machine: UInt16 = 62, address: UInt64 = 0x20_0000, memorySize: UInt64? = nil) -> [UInt8] {
        let headers: UInt64 = 64 + 56
        var file: [UInt8] = [0x7f, 0x45, 0x4c, 0x46, 2, 1, 1, 0] + [UInt8](repeating: 0, count: 8)
        func add<Number: FixedWidthInteger>(_ number: Number) { withUnsafeBytes(of: number.littleEndian) { file += $0 } }
        add(UInt16(2))  // ET_EXEC
        add(machine)
        add(UInt32(1))
        add(address)  // entry
        add(UInt64(64))  // program headers
        add(UInt64(0))
        add(UInt32(0))
        for value: UInt16 in [64, 56, 1, 64, 0, 0] { add(value) }
        add(UInt32(1))  // PT_LOAD
        add(UInt32(5))  // readable, executable
        add(headers)
        add(address)
        add(address)
        add(UInt64(code.count))
        add(memorySize ?? UInt64(code.count))
        add(UInt64(16))
        return file + code
    }
}
