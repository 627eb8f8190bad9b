// SPDX-License-Identifier: Apache-2.0

/// The registers that the debugger sees, in the order of the packets `g` and `G`: those that GDB wants of every x86-64
/// target, then the system's (target.xml; "i386 Features" in the manual of GDB).
public enum RegisterSet {
    public struct Register: Sendable {
        public let name: String
        /// Bytes.
        public let size: Int
        /// The offset in ``RegisterFile``.
        public let offset: Int
        fileprivate let type: String
        fileprivate let group: String?
    }

    /// Numbers of the first register of each kind.
    public static let rip = 16, eflags = 17, segments = 18, st0 = 24, x87Control = 32, xmm0 = 40, mxcsr = 56
    public static let fsBase = 57, gsBase = 58, kernelGSBase = 59, cr0 = 60, cr2 = 61, cr3 = 62, cr4 = 63, cr8 = 64,
        efer = 65

    public static let all: [Register] = {
        var registers: [Register] = []
        func add(_ names: [String], size: Int, type: String, group: String? = nil) {
            for name in names {
                let offset = registers.last.map { $0.offset + $0.size } ?? 0
                registers.append(Register(name: name, size: size, offset: offset, type: type, group: group))
            }
        }
        add(["rax", "rbx", "rcx", "rdx", "rsi", "rdi"], size: 8, type: "int64")
        add(["rbp", "rsp"], size: 8, type: "data_ptr")
        add((8...15).map { "r\($0)" }, size: 8, type: "int64")
        add(["rip"], size: 8, type: "code_ptr")
        add(["eflags"], size: 4, type: "i386_eflags")
        add(["cs", "ss", "ds", "es", "fs", "gs"], size: 4, type: "int32")
        add((0...7).map { "st\($0)" }, size: 10, type: "i387_ext")
        add(
            ["fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop"], size: 4, type: "int", group: "float")
        add((0...15).map { "xmm\($0)" }, size: 16, type: "vec128")
        add(["mxcsr"], size: 4, type: "i386_mxcsr", group: "vector")
        add(["fs_base", "gs_base"], size: 8, type: "int64")
        add(["k_gs_base"], size: 8, type: "int64", group: "system")
        add(["cr0"], size: 8, type: "cr0", group: "system")
        add(["cr2", "cr3"], size: 8, type: "int64", group: "system")
        add(["cr4"], size: 8, type: "cr4", group: "system")
        add(["cr8"], size: 8, type: "int64", group: "system")
        add(["efer"], size: 8, type: "efer", group: "system")
        return registers
    }()

    /// Bytes of all of them.
    public static let size = all.reduce(0) { $0 + $1.size }

    // MARK: Description

    /// target.xml, which describes the registers to the debugger.
    static let description: String = {
        var text = """
            <?xml version="1.0"?>
            <!DOCTYPE target SYSTEM "gdb-target.dtd">
            <target version="1.0">
            <architecture>i386:x86-64</architecture>

            """
        let eflags = flags(
            "i386_eflags", size: 4,
            [
                (0, "CF"), (1, ""), (2, "PF"), (4, "AF"), (6, "ZF"), (7, "SF"), (8, "TF"), (9, "IF"), (10, "DF"),
                (11, "OF"), (14, "NT"), (16, "RF"),
                (17, "VM"), (18, "AC"), (19, "VIF"), (20, "VIP"), (21, "ID"),
            ])
        text += feature("org.gnu.gdb.i386.core", [eflags], all[..<xmm0])
        let vectors = [
            ("v4f", "ieee_single", 4), ("v2d", "ieee_double", 2), ("v16i8", "int8", 16), ("v8i16", "int16", 8),
            ("v4i32", "int32", 4), ("v2i64", "int64", 2),
        ]
        let fields = ["v4_float", "v2_double", "v16_int8", "v8_int16", "v4_int32", "v2_int64"]
        var vector =
            vectors.map { "<vector id=\"\($0.0)\" type=\"\($0.1)\" count=\"\($0.2)\"/>\n" }.joined()
            + "<union id=\"vec128\">\n"
        for (field, type) in zip(fields, vectors) { vector += "<field name=\"\(field)\" type=\"\(type.0)\"/>\n" }
        vector += "<field name=\"uint128\" type=\"uint128\"/>\n</union>\n"
        let mxcsr = flags(
            "i386_mxcsr", size: 4,
            [
                (0, "IE"), (1, "DE"), (2, "ZE"), (3, "OE"), (4, "UE"), (5, "PE"), (6, "DAZ"), (7, "IM"), (8, "DM"),
                (9, "ZM"), (10, "OM"), (11, "UM"),
                (12, "PM"), (15, "FZ"),
            ])
        text += feature("org.gnu.gdb.i386.sse", [vector, mxcsr], all[xmm0..<fsBase])
        text += feature("org.gnu.gdb.i386.segments", [], all[fsBase..<kernelGSBase])
        let system = [
            flags(
                "cr0", size: 8,
                [
                    (0, "PE"), (1, "MP"), (2, "EM"), (3, "TS"), (4, "ET"), (5, "NE"), (16, "WP"), (18, "AM"),
                    (29, "NW"), (30, "CD"), (31, "PG"),
                ]),
            flags(
                "cr4", size: 8,
                [
                    (0, "VME"), (1, "PVI"), (2, "TSD"), (3, "DE"), (4, "PSE"), (5, "PAE"), (6, "MCE"), (7, "PGE"),
                    (8, "PCE"), (9, "OSFXSR"),
                    (10, "OSXMMEXCPT"), (11, "UMIP"), (12, "LA57"), (13, "VMXE"), (14, "SMXE"), (16, "FSGSBASE"),
                    (17, "PCIDE"), (18, "OSXSAVE"),
                    (20, "SMEP"), (21, "SMAP"), (22, "PKE"), (23, "CET"), (24, "PKS"),
                ]),
            flags(
                "efer", size: 8,
                [
                    (0, "SCE"), (8, "LME"), (10, "LMA"), (11, "NXE"), (12, "SVME"), (13, "LMSLE"), (14, "FFXSR"),
                    (15, "TCE"),
                ]),
        ]
        text += feature("org.swkvm.x86.system", system, all[kernelGSBase...])
        return text + "</target>\n"
    }()

    private static func flags(_ name: String, size: Int, _ bits: [(Int, String)]) -> String {
        let fields = bits.map { "<field name=\"\($0.1)\" start=\"\($0.0)\" end=\"\($0.0)\"/>\n" }.joined()
        return "<flags id=\"\(name)\" size=\"\(size)\">\n\(fields)</flags>\n"
    }

    private static func feature(_ name: String, _ types: [String], _ registers: ArraySlice<Register>) -> String {
        var text = "<feature name=\"\(name)\">\n" + types.joined()
        for (number, register) in zip(registers.indices, registers) {
            let group = register.group.map { " group=\"\($0)\"" } ?? ""
            text +=
                "<reg name=\"\(register.name)\" bitsize=\"\(register.size * 8)\" type=\"\(register.type)\"\(group) regnum=\"\(number)\"/>\n"
        }
        return text + "</feature>\n"
    }
}

/// The values of one thread's registers. Numbers are those of ``RegisterSet/all``.
public struct RegisterFile: Sendable, Equatable {
    /// All of them, little-endian.
    public private(set) var bytes = [UInt8](repeating: 0, count: RegisterSet.size)
    private var missing = Set<Int>()

    public init() {}

    /// Marks a register whose value is unavailable.
    public mutating func setMissing(_ number: Int) { missing.insert(number) }

    public func isMissing(_ number: Int) -> Bool { missing.contains(number) }

    /// The register's bytes.
    public func bytes(of number: Int) -> ArraySlice<UInt8> {
        let register = RegisterSet.all[number]
        return bytes[register.offset..<register.offset + register.size]
    }

    /// - Parameter value: as many bytes as the register has.
    public mutating func setBytes(_ value: some Collection<UInt8>, of number: Int) {
        let register = RegisterSet.all[number]
        precondition(value.count == register.size)
        bytes.replaceSubrange(register.offset..<register.offset + register.size, with: value)
    }

    /// The register's lowest 64 bits as a number.
    public subscript(number: Int) -> UInt64 {
        get { bytes(of: number).prefix(8).reversed().reduce(0) { $0 << 8 | UInt64($1) } }
        set {
            let size = RegisterSet.all[number].size
            setBytes(
                (0..<size).map { $0 < 8 ? UInt8(truncatingIfNeeded: newValue >> (8 * UInt64($0))) : 0 }, of: number)
        }
    }
}
