// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// A structure of the kernel's that begins with a 32-bit count and ends in an array of that many elements:
/// `kvm_cpuid2`, `kvm_msrs`, `kvm_irq_routing`.
@safe struct CountedArray<Element>: ~Copyable {
    /// What the ioctl gets.
    let address: UnsafeMutableRawPointer
    private let capacity: Int
    private let arrayOffset: Int

    /// Room for `capacity` elements, all zero, and a count that says so.
    /// - Parameter headerSize: bytes before the array.
    init(headerSize: Int, capacity: Int) {
        self.capacity = capacity
        arrayOffset = headerSize
        let size = headerSize + capacity * MemoryLayout<Element>.stride
        // The buffer is `size` bytes long; Element is a plain C structure, for which all zero is a value.
        unsafe address = .allocate(byteCount: size, alignment: 16)
        unsafe address.initializeMemory(as: UInt8.self, repeating: 0, count: size)
        count = capacity
    }

    init(headerSize: Int, _ elements: [Element]) {
        self.init(headerSize: headerSize, capacity: elements.count)
        for (index, element) in elements.enumerated() { unsafe pointer(index).pointee = element }
    }

    /// The count in the header, which the kernel may change.
    var count: Int {
        get { unsafe Int(address.load(as: UInt32.self)) }
        set { unsafe address.storeBytes(of: UInt32(newValue), as: UInt32.self) }
    }

    /// As many elements as the header counts, or all if it counts more than there are.
    var elements: [Element] {
        (0..<min(count, capacity)).map { unsafe pointer($0).pointee }
    }

    // `index` is below `capacity` at both callers.
    private func pointer(_ index: Int) -> UnsafeMutablePointer<Element> {
        unsafe (address + arrayOffset + index * MemoryLayout<Element>.stride).assumingMemoryBound(to: Element.self)
    }

    deinit { unsafe address.deallocate() }
}
