// SPDX-License-Identifier: Apache-2.0

/// Exit status of the `panic` command, and of a fault of the kernel.
enum ExitStatus {
    static let fault = 62
    static let panic = 63
}

private let exceptionNames: InlineArray<22, StaticString> = [
    "divide error", "debug", "NMI", "breakpoint", "overflow", "bound range", "invalid opcode", "device not available",
    "double fault",
    "coprocessor segment", "invalid TSS", "segment not present", "stack fault", "general protection", "page fault",
    "reserved",
    "x87 error", "alignment check", "machine check", "SIMD error", "virtualization", "control protection",
]

/// Called after an exception, in ring 3 on a stack of its own, with the frame that entry.S pushed.
@c(faultReport)
func faultReport(_ frameAddress: UInt64) -> Never {
    // Copied first: printing enters ring 0, on the stack that the frame lies on.
    var frame = InlineArray<24, UInt64>(repeating: 0)
    for index in 0..<24 { frame[index] = Address(frameAddress).load(UInt64(index) * 8) }
    let vector = frame[17]
    let name: StaticString = vector < 22 ? exceptionNames[Int(vector)] : "exception"
    Console.hello("\r\nfault: ")  // without allocating: the memory may be the cause
    Console.print("\(name), vector \(vector), error code 0x\(hex: frame[18]), CR2 0x\(hex: frame[0], width: 16)")
    if vector == 6 { Console.print("(Swift executes ud2 when a precondition fails, such as an index out of range)") }
    printRegisters(frame)
    Power.exit(ExitStatus.fault)
}

/// The registers of a frame that entry.S pushed: CR2, CR3, R15 … R8, RBP, RDI, RSI, RDX, RCX, RBX, RAX, vector, error
/// code, RIP, CS, RFLAGS, RSP, SS.
private func printRegisters(_ frame: InlineArray<24, UInt64>) {
    let names: InlineArray<22, StaticString> = [
        "RIP", "RSP", "RFL", "CS ", "SS ", "CR3", "RAX", "RBX", "RCX", "RDX", "RSI", "RDI", "RBP", "R8 ", "R9 ", "R10",
        "R11", "R12",
        "R13", "R14", "R15", "CR2",
    ]
    let places: InlineArray<22, Int> = [19, 22, 21, 20, 23, 1, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 0]
    var line = Text()
    for index in 0..<22 {
        let end: StaticString = index % 4 == 3 || index == 21 ? "\n" : "  "
        line.append("\(names[index]) \(hex: frame[places[index]], width: 16)\(end)")
    }
    Console.write(line)
}
