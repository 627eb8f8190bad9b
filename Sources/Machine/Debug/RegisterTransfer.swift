// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import GDBRemote
internal import KVM

/// A stopped vCPU's registers, as the debugger has them.
extension VirtualCPU {
    private static let kernelGSBase: UInt32 = 0xc000_0102

    /// Where things are in the `XSAVE` area (Intel SDM volume 1, §10.5.1).
    private enum Area {
        static let control = 0, status = 2, tags = 4, opcode = 6, instruction = 8, operand = 16, mxcsr = 24, st0 = 32,
            xmm0 = 160
        /// The bit vector of what the area holds; x87 and SSE are bits 0 and 1.
        static let present = 512
    }

    /// All that the debugger knows of.
    func debugRegisters() throws(KVMError) -> RegisterFile {
        var file = RegisterFile()
        let general = try registers()
        for (number, path) in Self.generalRegisters.enumerated() { file[number] = general[keyPath: path] }
        file[RegisterSet.rip] = general.rip
        file[RegisterSet.eflags] = general.rflags
        let system = try systemRegisters()
        for (index, segment) in [system.cs, system.ss, system.ds, system.es, system.fs, system.gs].enumerated() {
            file[RegisterSet.segments + index] = UInt64(segment.selector)
        }
        file[RegisterSet.fsBase] = system.fs.base
        file[RegisterSet.gsBase] = system.gs.base
        for (number, path) in Self.systemRegisterPaths { file[number] = system[keyPath: path] }
        if let value = try modelSpecificRegisters([Self.kernelGSBase])[Self.kernelGSBase] {
            file[RegisterSet.kernelGSBase] = value
        } else {
            file.setMissing(RegisterSet.kernelGSBase)
        }
        if let area = try? extendedState() {
            Self.copyVectorRegisters(from: area, to: &file)
        } else {
            for number in RegisterSet.st0..<RegisterSet.fsBase { file.setMissing(number) }
        }
        return file
    }

    /// Sets those with the given numbers; segment selectors cannot be set, since a selector without its descriptor
    /// means nothing.
    func setDebugRegisters(_ file: RegisterFile, changing numbers: [Int]) throws(DebugTargetError) {
        let before: RegisterFile
        do throws(KVMError) { before = try debugRegisters() } catch { throw .refused }
        let changed = numbers.filter { file.bytes(of: $0) != before.bytes(of: $0) }
        guard
            !changed.contains(where: { (RegisterSet.segments..<RegisterSet.st0).contains($0) || before.isMissing($0) })
        else { throw .refused }
        do throws(KVMError) { try change(file, changed) } catch {
            // All or nothing: what was set before the one that was refused goes back.
            try? change(before, changed)
            throw .refused
        }
    }

    private func change(_ file: RegisterFile, _ numbers: [Int]) throws(KVMError) {
        if numbers.contains(where: {
            $0 > RegisterSet.kernelGSBase || $0 == RegisterSet.fsBase || $0 == RegisterSet.gsBase
        }) {
            var system = try systemRegisters()
            for (number, path) in Self.systemRegisterPaths { system[keyPath: path] = file[number] }
            system.fs.base = file[RegisterSet.fsBase]
            system.gs.base = file[RegisterSet.gsBase]
            try setSystemRegisters(system)
        }
        if numbers.contains(RegisterSet.kernelGSBase) {
            try setModelSpecificRegister(Self.kernelGSBase, file[RegisterSet.kernelGSBase])
        }
        if numbers.contains(where: { (RegisterSet.st0..<RegisterSet.fsBase).contains($0) }) {
            var area = try extendedState()
            Self.copyVectorRegisters(from: file, to: &area)
            try setExtendedState(area)
        }
        if numbers.contains(where: { $0 <= RegisterSet.eflags }) {
            var general = try registers()
            for (number, path) in Self.generalRegisters.enumerated() { general[keyPath: path] = file[number] }
            general.rip = file[RegisterSet.rip]
            general.rflags = file[RegisterSet.eflags]
            try setRegisters(general)
        }
    }

    /// In the debugger's order.
    private static var generalRegisters: [WritableKeyPath<kvm_regs, UInt64>] {
        [\.rax, \.rbx, \.rcx, \.rdx, \.rsi, \.rdi, \.rbp, \.rsp, \.r8, \.r9, \.r10, \.r11, \.r12, \.r13, \.r14, \.r15]
    }

    private static var systemRegisterPaths: [(Int, WritableKeyPath<kvm_sregs, UInt64>)] {
        [
            (RegisterSet.cr0, \.cr0), (RegisterSet.cr2, \.cr2), (RegisterSet.cr3, \.cr3), (RegisterSet.cr4, \.cr4),
            (RegisterSet.cr8, \.cr8),
            (RegisterSet.efer, \.efer),
        ]
    }

    // MARK: x87 and SSE

    private static func copyVectorRegisters(from area: [UInt8], to file: inout RegisterFile) {
        for index in 0..<8 { file.setBytes(area[(Area.st0 + 16 * index)...].prefix(10), of: RegisterSet.st0 + index) }
        for index in 0..<16 {
            file.setBytes(area[(Area.xmm0 + 16 * index)...].prefix(16), of: RegisterSet.xmm0 + index)
        }
        file.setBytes(area[Area.mxcsr...].prefix(4), of: RegisterSet.mxcsr)
        let control = RegisterSet.x87Control
        file[control] = number(area, Area.control, 2)
        file[control + 1] = number(area, Area.status, 2)
        file[control + 2] = UInt64(
            X87Tags.full(area[Area.tags], status: UInt16(file[control + 1])) { file.bytes(of: RegisterSet.st0 + $0) })
        // In long mode the pointers have 64 bits and no segments; the debugger's layout is the older one, of two
        // halves.
        file[control + 3] = number(area, Area.instruction + 4, 4)
        file[control + 4] = number(area, Area.instruction, 4)
        file[control + 5] = number(area, Area.operand + 4, 4)
        file[control + 6] = number(area, Area.operand, 4)
        file[control + 7] = number(area, Area.opcode, 2)
    }

    private static func copyVectorRegisters(from file: RegisterFile, to area: inout [UInt8]) {
        func set(_ offset: Int, _ bytes: some Collection<UInt8>) {
            area.replaceSubrange(offset..<offset + bytes.count, with: bytes)
        }
        for index in 0..<8 { set(Area.st0 + 16 * index, file.bytes(of: RegisterSet.st0 + index)) }
        for index in 0..<16 { set(Area.xmm0 + 16 * index, file.bytes(of: RegisterSet.xmm0 + index)) }
        set(Area.mxcsr, file.bytes(of: RegisterSet.mxcsr))
        let control = RegisterSet.x87Control
        set(Area.control, file.bytes(of: control).prefix(2))
        set(Area.status, file.bytes(of: control + 1).prefix(2))
        set(Area.tags, [X87Tags.abridged(UInt16(truncatingIfNeeded: file[control + 2]))])
        set(Area.opcode, file.bytes(of: control + 7).prefix(2))
        set(Area.instruction, file.bytes(of: control + 4))
        set(Area.instruction + 4, file.bytes(of: control + 3))
        set(Area.operand, file.bytes(of: control + 6))
        set(Area.operand + 4, file.bytes(of: control + 5))
        area[Area.present] |= 3
    }

    private static func number(_ area: [UInt8], _ offset: Int, _ size: Int) -> UInt64 {
        area[offset..<offset + size].reversed().reduce(0) { $0 << 8 | UInt64($1) }
    }
}

/// The x87 tag word: two bits for each physical register, of which `FXSAVE` and `XSAVE` keep one (Intel SDM volume 1,
/// §8.1.7 and §10.5.1.1).
enum X87Tags {
    /// - Parameters:
    ///   - status: the status word, whose TOP says which physical register is ST0.
    ///   - value: the ten bytes of ST(n).
    static func full(_ abridged: UInt8, status: UInt16, _ value: (Int) -> ArraySlice<UInt8>) -> UInt16 {
        let top = Int(status >> 11 & 7)
        return (0..<8).reduce(0) { tags, physical in
            let tag: UInt16 = abridged >> physical & 1 == 0 ? 3 : self.tag(of: Array(value((physical - top) & 7)))
            return tags | tag << (2 * physical)
        }
    }

    /// A register that is empty has both bits set.
    static func abridged(_ full: UInt16) -> UInt8 {
        (0..<8).reduce(0) { tags, physical in full >> (2 * physical) & 3 == 3 ? tags : tags | 1 << physical }
    }

    /// 0 for a number, 1 for zero, 2 for what is neither (infinity, NaN, denormal, unnormal).
    private static func tag(of bytes: [UInt8]) -> UInt16 {
        let exponent = UInt16(bytes[9] & 0x7f) << 8 | UInt16(bytes[8])
        if exponent == 0 { return bytes[..<8].allSatisfy { $0 == 0 } ? 1 : 2 }
        return exponent == 0x7fff || bytes[7] & 0x80 == 0 ? 2 : 0
    }
}
