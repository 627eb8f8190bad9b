// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// A fixed number of elements, which stay where they are and are reached by index. Every index is checked.
///
/// An element is read and changed in place: nothing is copied, allocated or counted. Who shares a slab with other
/// threads sees to it that one of them at a time uses an element.
@safe final class Slab<Element: ~Copyable> {
    private let start: UnsafeMutablePointer<Element>
    let count: Int
    /// What the elements lie in, if they were not allocated one by one; it releases them.
    private let mapping: Mapping?

    /// - Parameter element: makes the element of an index.
    init(count: Int, _ element: (Int) -> Element) {
        // Initialised below, released in `deinit`.
        unsafe start = .allocate(capacity: max(1, count))
        self.count = count
        mapping = nil
        // Below the capacity.
        for index in 0..<count { unsafe (start + index).initialize(to: element(index)) }
    }

    /// Takes over elements that have been initialised.
    fileprivate init(_ start: UnsafeMutablePointer<Element>, count: Int) {
        unsafe self.start = start
        self.count = count
        mapping = nil
    }

    /// Elements in a mapping that has room for them.
    fileprivate init(_ mapping: consuming Mapping, count: Int) {
        // It is page-aligned and zero.
        unsafe start = mapping.start.bindMemory(to: Element.self, capacity: count)
        self.count = count
        self.mapping = consume mapping
    }

    deinit {
        guard mapping == nil else { return }
        // All of them, of which this is the only owner.
        unsafe start.deinitialize(count: count)
        unsafe start.deallocate()
    }

    var indices: Range<Int> { 0..<count }

    @inline(__always) subscript(index: Int) -> Element {
        unsafeAddress {
            precondition(UInt(bitPattern: index) < UInt(bitPattern: count), "no such element")
            // Below the count.
            return unsafe UnsafePointer(start + index)
        }
        unsafeMutableAddress {
            precondition(UInt(bitPattern: index) < UInt(bitPattern: count), "no such element")
            // Below the count.
            return unsafe start + index
        }
    }

    /// Where an element is, for C code that keeps the address. It is valid as long as the slab.
    @unsafe @inline(__always) func address(of index: Int) -> UnsafeMutablePointer<Element> {
        precondition(indices.contains(index), "no such element")
        // Below the count.
        return unsafe start + index
    }

    @inline(__always) subscript(index: Int32) -> Element {
        unsafeAddress {
            precondition(UInt32(bitPattern: index) < UInt32(truncatingIfNeeded: count), "no such element")
            // Below the count.
            return unsafe UnsafePointer(start + Int(index))
        }
        unsafeMutableAddress {
            precondition(UInt32(bitPattern: index) < UInt32(truncatingIfNeeded: count), "no such element")
            // Below the count.
            return unsafe start + Int(index)
        }
    }
}

extension Slab where Element: BitwiseCopyable {
    /// Elements whose bytes are all zero at first. The kernel gives memory as it is touched.
    /// - Precondition: zero bytes are a valid `Element`: hence unsafe.
    @unsafe convenience init(zeroed count: Int) throws(SystemCallError) {
        let size = max(1, count * MemoryLayout<Element>.stride)
        try self.init(Mapping(size: size, flags: MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE), count: count)
    }
}

/// Elements that become a ``Slab`` when all are there, and go with this value until then.
@safe struct SlabBuilder<Element: ~Copyable>: ~Copyable {
    private let start: UnsafeMutablePointer<Element>
    private let capacity: Int
    private(set) var count = 0

    init(capacity: Int) {
        // Uninitialised up to `count`; released in `deinit`.
        unsafe start = .allocate(capacity: max(1, capacity))
        self.capacity = capacity
    }

    deinit {
        // As many as were appended.
        unsafe start.deinitialize(count: count)
        unsafe start.deallocate()
    }

    mutating func append(_ element: consuming Element) {
        precondition(count < capacity, "no room for another element")
        // Below the capacity.
        unsafe (start + count).initialize(to: element)
        count += 1
    }

    subscript(index: Int) -> Element {
        unsafeAddress {
            precondition(UInt(bitPattern: index) < UInt(bitPattern: count), "no such element")
            // Below the count.
            return unsafe UnsafePointer(start + index)
        }
        mutating unsafeMutableAddress {
            precondition(UInt(bitPattern: index) < UInt(bitPattern: count), "no such element")
            // Below the count.
            return unsafe start + index
        }
    }

    /// The elements, in memory of their own size; this value is empty afterwards.
    mutating func takeSlab() -> Slab<Element> {
        let taken = UnsafeMutablePointer<Element>.allocate(capacity: max(1, count))
        // As many as were appended.
        unsafe taken.moveInitialize(from: start, count: count)
        defer { count = 0 }
        return unsafe Slab(taken, count: count)
    }
}
