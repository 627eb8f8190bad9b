// SPDX-License-Identifier: Apache-2.0

/// Memory, processors, timer and interrupts.
extension SelfTest {
    func memory() {
        check("memory: the map has RAM beyond the kernel") { () throws(Failure) in
            try expect(boot.memory >= 16 << 20, "\(boot.memory >> 20) MiB in the memory map")
        }
        check("memory: pages are allocated, freed and merged") { () throws(Failure) in
            let before = unsafe pages.free
            let longest = unsafe pages.longest.size
            var taken: [Address] = []
            for count in UInt64(1)...8 {
                guard let address = unsafe pages.allocate(pages: count) else { throw Failure("no \(count) pages") }
                try expect(address.value % PageAllocator.pageSize == 0, "0x\(hex: address.value) is not a page")
                taken.append(address)
            }
            for index in [1, 7, 0, 3, 5, 2, 6, 4] { unsafe pages.release(taken[index], pages: UInt64(index) + 1) }
            try unsafe expect(
                pages.free == before && pages.longest.size == longest, "\(pages.free) bytes free, \(before) before")
            try unsafe expect(pages.allocate(pages: UInt64.max >> 12) == nil, "more pages than exist were allocated")
        }
        check("memory: a pattern in every part of it") { () throws(Failure) in
            let whole: UInt64 = 64 << 20
            var tested: UInt64 = 0
            for (start, end) in unsafe pages.extents {  // nothing is allocated while this runs
                let dense = min(end, start + (whole > tested ? whole - tested : 0))
                try pattern(start, dense)
                tested += dense - start
                for page in stride(from: dense, to: end, by: 16 << 20) {
                    Pattern.fill(Address(page), count: PageAllocator.pageSize)
                }
                for page in stride(from: dense, to: end, by: 16 << 20) {
                    try expect(
                        Pattern.mismatches(Address(page), count: PageAllocator.pageSize) == 0, "at 0x\(hex: page)")
                }
                try pattern(end - PageAllocator.pageSize, end)
            }
        }
    }

    private func pattern(_ start: UInt64, _ end: UInt64) throws(Failure) {
        for seed in [0, UInt64.max] {
            Pattern.fill(Address(start), count: end - start, seed: seed)
            let wrong = Pattern.mismatches(Address(start), count: end - start, seed: seed)
            try expect(wrong == 0, "\(wrong) wrong words in 0x\(hex: start) – 0x\(hex: end)")
        }
    }

    func cpus() {
        check("cpus: all \(max(acpi.processors.count, 1)) respond") { () throws(Failure) in
            let silent = processors.start()
            try expect(silent == 0, "\(silent) did not start")
            try expect(processors.count == max(acpi.processors.count, 1), "\(processors.count) run")
        }
        check("cpus: they add to one word concurrently") { () throws(Failure) in
            guard let page = unsafe pages.allocate() else { throw Failure("no memory") }
            defer { unsafe pages.release(page, pages: 1) }
            page.store(UInt64(0))
            for processor in processors.others { processors.ask(processor, .count, page.value) }
            _ = ProcessorTask.run(ProcessorTask.count.rawValue, page.value)
            for processor in processors.others {
                try expect(processors.result(processor) != nil, "CPU \(processor.identifier) is not done")
            }
            let sum: UInt64 = page.load()
            try expect(sum == ProcessorTask.additions * UInt64(processors.count), "the sum is \(sum)")
        }
        check("cpus: each sees what the first wrote") { () throws(Failure) in
            let count = ProcessorTask.patternSize / PageAllocator.pageSize
            guard let memory = unsafe pages.allocate(pages: count) else { throw Failure("no memory") }
            defer { unsafe pages.release(memory, pages: count) }
            Pattern.fill(memory, count: ProcessorTask.patternSize)
            for processor in processors.others { processors.ask(processor, .checkPattern, memory.value) }
            for processor in processors.others {
                let wrong = processors.result(processor)
                try expect(wrong == 0, "CPU \(processor.identifier) sees \(wrong ?? UInt64.max) wrong words")
            }
        }
        check("cpus: each interrupts the first") { () throws(Failure) in
            let own = UInt64(LocalAPIC.identifier)
            for processor in processors.others {
                let before = interrupts.counts[LocalAPIC.messageLine]
                processors.ask(processor, .interrupt, own)
                let came = interrupts.wait(until: clock.now + 2 * seconds) {
                    interrupts.counts[LocalAPIC.messageLine] > before
                }
                try expect(came && processors.result(processor) == 0, "none from CPU \(processor.identifier)")
            }
        }
    }

    func timer() {
        check("timer: the clock advances (\(clock.frequency / 1_000_000) MHz by \(clock.source))") {
            () throws(Failure) in
            var last = clock.now
            for _ in 0..<10_000 {
                let now = clock.now
                try expect(now >= last, "from \(last) to \(now) ns")
                last = now
            }
        }
        check("timer: fires once, and not early") { () throws(Failure) in
            let before = interrupts.counts[LocalAPIC.timerLine]
            let start = clock.now
            interrupts.setTimer(after: 5 * milliseconds)
            while interrupts.counts[LocalAPIC.timerLine] == before {
                try expect(clock.now - start < 5 * seconds, "it did not fire")
                interrupts.dispatch()
            }
            try expect(clock.now - start > 3 * milliseconds, "after \(clock.now - start) ns instead of 5000000")
            clock.spin(20 * milliseconds)
            interrupts.dispatch()
            try expect(interrupts.counts[LocalAPIC.timerLine] == before + 1, "it fired again")
        }
        check("timer: wakes a sleeping CPU a hundred times") { () throws(Failure) in
            let before = interrupts.counts[LocalAPIC.timerLine]
            interrupts.setPeriodicTimer(frequency: 1000)
            let end = clock.now + 10 * seconds
            while interrupts.counts[LocalAPIC.timerLine] < before + 100 && clock.now < end {
                interrupts.dispatch()
                idle()
            }
            interrupts.setPeriodicTimer(frequency: 0)
            try expect(
                interrupts.counts[LocalAPIC.timerLine] >= before + 100,
                "\(interrupts.counts[LocalAPIC.timerLine] - before) times")
        }
    }

    func interruptLines() {
        check("irq: a thousand interrupts to itself, each wakes it") { () throws(Failure) in
            let own = LocalAPIC.identifier
            for count in 0..<1000 {
                let before = interrupts.counts[LocalAPIC.messageLine]
                LocalAPIC.send(line: LocalAPIC.messageLine, to: own)
                let came = interrupts.wait(until: clock.now + 2 * seconds) {
                    interrupts.counts[LocalAPIC.messageLine] > before
                }
                try expect(came, "number \(count) was lost")
            }
        }
        check("irq: the serial port's line, through the IOAPIC") { () throws(Failure) in
            var came = false
            Console.handleInterrupt { came = true }
            Console.listen(transmitter: true)
            let answered = interrupts.wait(until: clock.now + 2 * seconds) { came }
            Console.listen()
            try expect(answered, "GSI \(acpi.isaInterrupts[Console.line]) does not fire")
        }
    }
}
