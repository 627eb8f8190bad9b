// SPDX-License-Identifier: Apache-2.0

/// Kernels of a few bytes, for what the bundled guest does not do.
enum TinyKernel {
    /// Disables interrupts and halts: it hears of no power button.
    static let deaf: [UInt8] = [0xfa, 0xf4, 0xeb, 0xfc]  // 1: cli; hlt; jmp 1b
    /// Runs in circles.
    static let busy: [UInt8] = [0xeb, 0xfe]
    /// Writes without end: mov dx, 0x3f8; mov al, 'x'; 1: out dx, al; jmp 1b
    static let talking: [UInt8] = [0x66, 0xba, 0xf8, 0x03, 0xb0, 0x78, 0xee, 0xeb, 0xfd]

    /// Reads each I/O port, as one byte, four and two, and writes zeroes to it; ends with status 42. A zero to the port
    /// of the status would end it.
    static let portSweeper: [UInt8] = [
        0x31, 0xd2,  // xor edx, edx
        0xec, 0xed, 0x66, 0xed,  // 1: in al, dx; in eax, dx; in ax, dx
        0x31, 0xc0,  // xor eax, eax
        0x66, 0x81, 0xfa, 0x01, 0x05, 0x74, 0x04,  // cmp dx, 0x501; je 2f
        0xee, 0xef, 0x66, 0xef,  // out dx, al; out dx, eax; out dx, ax
        0x66, 0xff, 0xc2, 0x75, 0xea,  // 2: inc dx; jnz 1b
        0x66, 0xba, 0x01, 0x05, 0xb0, 42, 0xee,  // mov dx, 0x501; mov al, 42; out dx, al
    ]
    /// Has the interval timer's channel 0 count periods (mode 2), writes a "t" and runs in circles.
    static let timerUser: [UInt8] = [
        0xb0, 0x34, 0xe6, 0x43, 0xb0, 0xff, 0xe6, 0x40, 0xe6, 0x40,  // outb 0x34, 0x43; 0xff to 0x40, twice
        0x66, 0xba, 0xf8, 0x03, 0xb0, 0x74, 0xee, 0xeb, 0xfe,  // mov dx, 0x3f8; mov al, 't'; out dx, al; 1: jmp 1b
    ]

    /// Entered as Linux is: writes its command line to the serial port and powers off.
    static let commandLinePrinter: [UInt8] = [
        0x8b, 0xb6, 0x28, 0x02, 0x00, 0x00,  // mov esi, [rsi + 0x228]: cmd_line_ptr of boot_params
        0x66, 0xba, 0xf8, 0x03,  // mov dx, 0x3f8
        0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb, 0xf8,  // 1: lodsb; test al, al; jz 2f; out dx, al; jmp 1b
        0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xeb, 0xfe,  // 2: mov dx, 0x600; mov al, 0x34; out dx, al; 3: jmp 3b
    ]

    /// A bzImage that runs `code` in long mode.
    static func bzImage(_ code: [UInt8]) -> [UInt8] {
        var file = [UInt8](repeating: 0, count: 1024 + 512) + code
        file += [UInt8](repeating: 0, count: -file.count & 15)
        func store<Number: FixedWidthInteger>(_ number: Number, _ offset: Int) {
            withUnsafeBytes(of: number.littleEndian) { file.replaceSubrange(offset..<offset + $0.count, with: $0) }
        }
        store(UInt8(1), 0x1f1)  // setup_sects
        store(UInt32((file.count - 1024) / 16), 0x1f4)  // syssize
        store(UInt16(0xaa55), 0x1fe)
        store(UInt16(0x6aeb), 0x200)  // jmp, which ends the header
        store(UInt32(0x5372_6448), 0x202)  // HdrS
        store(UInt16(0x20f), 0x206)
        store(UInt8(1), 0x211)  // loaded high
        store(UInt32(0x7fff_ffff), 0x22c)  // initrd_addr_max
        store(UInt32(0x20_0000), 0x230)  // kernel_alignment
        store(UInt16(1), 0x236)  // a 64-bit entry
        store(UInt32(2047), 0x238)  // cmdline_size
        store(UInt64(0x20_0000), 0x258)  // pref_address
        store(UInt32(0x1_0000), 0x260)  // init_size
        return file
    }

    /// An ELF file whose one segment is `code`, at 2 MiB.
    /// - Parameters:
    ///   - machine: the ELF header's machine, 62 for x86-64.
    ///   - address: where the segment goes.
    ///   - memorySize: of the segment, at least the code's size.
    ///   - namesLinux: adds a note of Linux's.
    static func elf(
        _ code: [UInt8], machine: UInt16 = 62, address: UInt64 = 0x20_0000, memorySize: UInt64? = nil,
        namesLinux: Bool = false
    ) -> [UInt8] {
        // The owner's size, that of the value, the type; the owner, padded.
        let note: [UInt8] = namesLinux ? [6, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0] + Array("Linux\0\0\0".utf8) : []
        let headers: UInt64 = 64 + (namesLinux ? 2 : 1) * 56
        var file: [UInt8] = [0x7f, 0x45, 0x4c, 0x46, 2, 1, 1, 0] + [UInt8](repeating: 0, count: 8)
        func add<Number: FixedWidthInteger>(_ number: Number) {
            withUnsafeBytes(of: number.littleEndian) { file += $0 }
        }
        add(UInt16(2))  // ET_EXEC
        add(machine)
        add(UInt32(1))
        add(address)  // entry
        add(UInt64(64))  // program headers
        add(UInt64(0))
        add(UInt32(0))
        for value: UInt16 in [64, 56, namesLinux ? 2 : 1, 64, 0, 0] { add(value) }
        add(UInt32(1))  // PT_LOAD
        add(UInt32(5))  // readable, executable
        add(headers)
        add(address)
        add(address)
        add(UInt64(code.count))
        add(memorySize ?? UInt64(code.count))
        add(UInt64(16))
        if namesLinux {
            add(UInt32(4))  // PT_NOTE
            add(UInt32(4))
            add(headers + UInt64(code.count))
            for value: UInt64 in [0, 0, UInt64(note.count), UInt64(note.count), 4] { add(value) }
        }
        return file + code + note
    }
}
