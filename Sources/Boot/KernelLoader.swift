// SPDX-License-Identifier: Apache-2.0

public import GuestMemory
internal import Linux
internal import Platform

/// Loads a kernel and its boot data into guest RAM, and returns the initial registers.
///
/// The files are opened and their headers checked once; ``load(into:isFresh:)`` is repeated at each reset.
public struct KernelLoader: Sendable {
    private let kernel: KernelImage
    private let initrd: BootFile?
    private let commandLine: [UInt8]
    private let tables: ACPITables?
    private let identity: SMBIOSTables?
    private let processors: MPTable?
    private let reserved: [Range<UInt64>]

    /// Creates a loader and checks its inputs.
    /// - Parameters:
    ///   - initrd: what the kernel is to find as its initial RAM disk.
    ///   - commandLine: complete; no longer than the kernel reads.
    ///   - tables: ACPI tables, built for ``PhysicalLayout/acpi``; without them the guest gets no RSDP.
    ///   - identity: SMBIOS tables, built for ``PhysicalLayout/smbios``.
    ///   - processors: the MultiProcessor table, for kernels that do not read ACPI tables.
    ///   - reserved: ranges in the hole that the map of memory has as reserved.
    public init(
        _ kernel: KernelImage, initrd: BootFile? = nil, commandLine: KernelCommandLine, tables: ACPITables? = nil,
        identity: SMBIOSTables? = nil, processors: MPTable? = nil,
        reserved: [Range<UInt64>] = []
    ) throws(BootError) {
        try commandLine.check(limit: kernel.commandLineLimit, kernel: "\(kernel.name) (\(kernel.kind))")
        if let initrd, initrd.size == 0 {
            throw .malformed(file: initrd.name, reason: "the initrd is empty")
        }
        self.kernel = kernel
        self.initrd = initrd
        self.commandLine = commandLine.text.rawBytes + [0]
        self.tables = tables
        self.identity = identity
        self.processors = processors
        self.reserved = reserved
    }

    private var file: BootFile { kernel.file }

    /// Writes kernel, initrd, command line, tables and start information into RAM.
    /// - Parameter isFresh: RAM is all zero, so nothing needs to be cleared. False after a reset.
    /// - Returns: the boot processor's registers.
    public func load(into guest: GuestMemory, isFresh: Bool) throws(BootError) -> BootState {
        let memory = BootMemory(guest)
        guard memory.size > PhysicalLayout.highRAM else {
            throw .doesNotFit(file: file.name, start: 0, end: PhysicalLayout.highRAM, limit: memory.size)
        }
        let limit = min(memory.size, PhysicalLayout.hole.lowerBound)
        let kernelEnd: UInt64
        var initrdLimit = limit
        var startAddress: UInt64 = 0
        var setupHeader: [UInt8]?
        switch kernel.format {
        case .elf(let image):
            kernelEnd = try load(image, into: memory, limit: limit, isFresh: isFresh)
        case .linux(let image):
            startAddress = try image.loadAddress(limit: limit, file: file.name)
            try memory.load(file, at: image.payloadOffset, count: image.payloadSize, to: startAddress)
            kernelEnd = startAddress + image.initialSize
            initrdLimit = min(limit, image.initrdLimit + 1)
            setupHeader = image.setupHeader
        }
        let initrd = try placeInitrd(after: kernelEnd, limit: initrdLimit, in: memory)
        try memory.write(commandLine, at: PhysicalLayout.commandLine)
        if let tables { try memory.write(tables.bytes, at: tables.address) }
        if let identity { try memory.write(identity.bytes, at: identity.address) }
        if let processors { try memory.write(processors.bytes, at: PhysicalLayout.multiProcessorTable) }

        let map = MemoryMapEntry.map(memorySize: memory.size, reserved: reserved)
        let startInfo = PVHStartInfo(
            commandLine: PhysicalLayout.commandLine, initrd: initrd, rsdp: tables?.rsdp ?? 0, memoryMap: map)
        try memory.write(startInfo.bytes(), at: PhysicalLayout.startInfo)
        try memory.write(LongMode.gdt, at: PhysicalLayout.gdt)
        try memory.write(ResetVector.code, at: PhysicalLayout.resetVector)

        switch kernel.entry {
        case .pvh(let address):
            return .protectedMode(at: address, startInfo: PhysicalLayout.startInfo)
        case .longMode(let address):
            return try longMode(at: address, memory)
        case .linux(let address):
            try writeBootParameters(setupHeader: nil, initrd: initrd, map: map, memory)
            return try longMode(at: address, bootParameters: PhysicalLayout.bootParameters, memory)
        case .bzImage:
            try writeBootParameters(setupHeader: setupHeader, initrd: initrd, map: map, memory)
            return try longMode(
                at: startAddress + LinuxImage.entryOffset, bootParameters: PhysicalLayout.bootParameters, memory)
        }
    }

    /// Loads the segments and returns the end of the highest one.
    private func load(
        _ image: ELFImage, into memory: BootMemory, limit: UInt64, isFresh: Bool
    ) throws(BootError) -> UInt64 {
        for segment in image.segments { try checkPlace(segment.address, segment.end, limit: limit) }
        for segment in image.segments {
            try memory.load(file, at: segment.fileOffset, count: segment.fileSize, to: segment.address)
            if !isFresh {
                try memory.clear(segment.address + segment.fileSize, count: segment.memorySize - segment.fileSize)
            }
        }
        return image.segments.last?.end ?? PhysicalLayout.highRAM
    }

    /// A segment may lie from 1 MiB on, or in conventional memory where the platform has nothing.
    private func checkPlace(_ start: UInt64, _ end: UInt64, limit: UInt64) throws(BootError) {
        typealias Layout = PhysicalLayout
        if start < Layout.highRAM {
            let isFree =
                start >= Layout.endOfBootData && end <= Layout.commandLine
                || start >= Layout.endOfCommandLine && end <= Layout.endOfLowRAM
            if !isFree { throw .reservedMemory(file: file.name, start: start, end: end) }
        } else if end > limit {
            throw .doesNotFit(file: file.name, start: start, end: end, limit: limit)
        }
    }

    /// Loads the initrd as high as it may be, out of the way of a kernel that grows upwards.
    private func placeInitrd(
        after kernelEnd: UInt64, limit: UInt64, in memory: BootMemory
    ) throws(BootError) -> (address: UInt64, size: UInt64)? {
        guard let initrd else { return nil }
        let lowest = max(kernelEnd, PhysicalLayout.highRAM).alignedUp(to: 4096) ?? .max
        let free = limit > lowest ? (limit - lowest).alignedDown(to: 4096) : 0
        guard initrd.size <= free else {
            throw .initrdDoesNotFit(file: initrd.name, size: initrd.size, free: free, limit: limit)
        }
        let address = (limit - initrd.size).alignedDown(to: 4096)
        try memory.load(initrd, at: 0, count: initrd.size, to: address)
        return (address, initrd.size)
    }

    private func writeBootParameters(
        setupHeader: [UInt8]?, initrd: (address: UInt64, size: UInt64)?, map: [MemoryMapEntry], _ memory: BootMemory
    ) throws(BootError) {
        var seed: [UInt8] = []
        for _ in 0..<4 { seed.append(littleEndian: UInt64.random(in: .min ... .max)) }
        try memory.write(LinuxBootParameters.randomSeed(seed), at: PhysicalLayout.setupData)
        let parameters = LinuxBootParameters(
            setupHeader: setupHeader, commandLine: PhysicalLayout.commandLine, initrd: initrd, rsdp: tables?.rsdp ?? 0,
            memoryMap: map, setupData: PhysicalLayout.setupData)
        try memory.write(parameters.bytes(), at: PhysicalLayout.bootParameters)
    }

    private func longMode(
        at entry: UInt64, bootParameters: UInt64 = 0, _ memory: BootMemory
    ) throws(BootError) -> BootState {
        try memory.write(LongMode.makePageTables(), at: PhysicalLayout.pageTables)
        var state = BootState.longMode(at: entry)
        state.rdi = PhysicalLayout.startInfo
        state.rsi = bootParameters
        return state
    }
}
