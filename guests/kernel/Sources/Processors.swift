// SPDX-License-Identifier: Apache-2.0

/// The tasks of an application processor. They allocate no memory and do not use the console.
enum ProcessorTask: UInt64 {
    /// Adds 1 to the word at the argument, `ProcessorTask.additions` times.
    case count = 1
    /// Compares `ProcessorTask.patternSize` bytes at the argument with the pattern; the result is the number of wrong
    /// words.
    case checkPattern = 2
    /// Sends the boot processor an interrupt.
    case interrupt = 3

    static let additions: UInt64 = 100_000
    static let patternSize: UInt64 = 1 << 20

    static func run(_ task: UInt64, _ argument: UInt64) -> UInt64 {
        switch ProcessorTask(rawValue: task) {
        case .count:
            for _ in 0..<additions { Address(argument).fetchAdd(1) }
            return additions
        case .checkPattern:
            return Pattern.mismatches(Address(argument), count: patternSize)
        case .interrupt:
            LocalAPIC.send(line: LocalAPIC.messageLine, to: UInt32(truncatingIfNeeded: argument))
            return 0
        case nil:
            return UInt64.max
        }
    }
}

/// The processors besides the boot processor. Each has a block of memory: its ring-0 stacks and pending word as entry.S
/// lays them out, a mailbox, and a stack for ring 3.
final class Processors: @unchecked Sendable {
    struct Processor {
        let identifier: UInt32
        fileprivate let block: Address
        fileprivate var mailbox: Address { block + Processors.mailboxOffset }
        fileprivate var isOnline: Bool { mailbox.load() as UInt64 == 1 }
    }

    /// Those that run, except the boot processor.
    private(set) var others: [Processor] = []
    private var started = false

    var count: Int { others.count + 1 }

    fileprivate static let mailboxOffset: UInt64 = 0x800
    private static let blockPages: UInt64 = 5  // the first for ring 0 and the mailbox, four for ring 3's stack

    // The mailbox: 0 online, 8 task, 16 argument, 24 result, 32 number of the last task, 40 number of the last
    // completed task.

    /// Starts all processors that the firmware lists. Returns how many did not answer.
    @discardableResult
    func start() -> Int {
        if started { return 0 }
        started = true
        Core.trampolineAddress.copy(from: Core.trampolineStart, count: Core.trampolineEnd - Core.trampolineStart)
        let own = LocalAPIC.identifier
        var starting: [Processor] = []
        for identifier in acpi.processors where identifier != own && starting.count + 1 < Core.maximumCPUs {
            guard let processor = prepare(identifier, index: starting.count + 1) else { break }
            starting.append(processor)
        }
        fence()
        for processor in starting { LocalAPIC.sendInit(to: processor.identifier) }
        clock.spin(200_000)
        // The second message is for processors that missed the first.
        for patience in [200 * milliseconds, 10 * seconds] {
            for processor in starting where !processor.isOnline {
                LocalAPIC.sendStartup(page: UInt32(Core.trampolineAddress.value >> 12), to: processor.identifier)
            }
            let end = clock.now + patience
            while starting.contains(where: { !$0.isOnline }) && clock.now < end { spinPause() }
        }
        others = starting.filter { $0.isOnline }
        return starting.count - others.count
    }

    /// The block, the TSS and its descriptor of the CPU with that APIC ID.
    private func prepare(_ identifier: UInt32, index: Int) -> Processor? {
        guard let block = unsafe pages.allocate(pages: Self.blockPages) else { return nil }
        block.fill(count: PageAllocator.pageSize)

        let tss = Core.bootTSS + UInt64(index) * Core.tssSize
        tss.fill(count: Core.tssSize)
        storeWord(block.value + Core.ring0StackOffset, tss + 4)
        storeWord(block.value + Core.pendingOffset, tss + 36)  // IST 1 ends at the pending word
        storeWord(block.value + Core.faultStackOffset, tss + 44)
        tss.store(UInt16(Core.tssBitmap - UInt64(index) * Core.tssSize), 102)
        let selector = Core.firstTSSSelector + 16 * index
        let limit = Core.tssLimit - UInt64(index) * Core.tssSize
        (Core.gdt + selector).store(limit | (tss.value & 0xff_ffff) << 16 | 0x89 << 40 | (tss.value >> 24 & 0xff) << 56)
        (Core.gdt + selector).store(tss.value >> 32, 8)

        let frame = block + Core.frameOffset
        frame.store(Core.processorMain.value)
        frame.store(Core.userCode, 8)
        frame.store(UInt64(0x202), 16)
        frame.store(block.value + Self.blockPages * PageAllocator.pageSize - 8, 24)
        frame.store(Core.userData, 32)
        block.store(UInt64(selector), Core.taskOffset)
        (Core.processorBlocks + UInt64(identifier) * 8).store(block.value)
        return Processor(identifier: identifier, block: block)
    }

    private func storeWord(_ value: UInt64, _ place: Address) {
        place.store(UInt32(truncatingIfNeeded: value))  // not aligned to eight
        place.store(UInt32(truncatingIfNeeded: value >> 32), 4)
    }

    /// Starts `task` and does not wait for it.
    func ask(_ processor: Processor, _ task: ProcessorTask, _ argument: UInt64) {
        let box = processor.mailbox
        box.store(task.rawValue, 8)
        box.store(argument, 16)
        fence()
        box.store((box.load(32) as UInt64) + 1, 32)
        LocalAPIC.send(line: LocalAPIC.messageLine, to: processor.identifier)
    }

    /// The result of the last task; nil if there is none within two seconds.
    func result(_ processor: Processor) -> UInt64? {
        let box = processor.mailbox
        let end = clock.now + 2 * seconds
        while box.load(40) as UInt64 != box.load(32) as UInt64 {
            if clock.now >= end { return nil }
            spinPause()
        }
        return box.load(24)
    }
}

let processors = Processors()

/// The main loop of an application processor, which sleeps until there is a task.
@c(processorMain)
func processorMain(_ blockAddress: UInt64) -> Never {
    let block = Address(blockAddress)
    let box = block + Processors.mailboxOffset
    LocalAPIC.start()
    box.store(UInt64(1))
    while true {
        _ = (block + Core.pendingOffset).exchange(0)
        let asked: UInt64 = box.load(32)
        if asked != box.load(40) as UInt64 {
            box.store(ProcessorTask.run(box.load(8), box.load(16)), 24)
            fence()
            box.store(asked, 40)
        } else {
            idle()
        }
    }
}

/// A pattern that depends on the address, so that memory at a wrong address is detected.
enum Pattern {
    static func word(_ address: UInt64, _ seed: UInt64) -> UInt64 { (address ^ seed) &* 0x9e37_79b9_7f4a_7c15 }

    static func fill(_ start: Address, count: UInt64, seed: UInt64 = 0) {
        for offset in stride(from: UInt64(0), to: count, by: 8) {
            start.store(word(start.value &+ offset, seed), offset)
        }
    }

    static func mismatches(_ start: Address, count: UInt64, seed: UInt64 = 0) -> UInt64 {
        var wrong: UInt64 = 0
        for offset in stride(from: UInt64(0), to: count, by: 8)
        where start.load(offset) as UInt64 != word(start.value &+ offset, seed) {
            wrong += 1
        }
        return wrong
    }
}
