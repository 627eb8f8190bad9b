// SPDX-License-Identifier: Apache-2.0

/// One value in memory of its own, where it stays until the cell goes. It is read and changed in place, as an element
/// of a ``Slab`` is: a case of an enumeration can hold it, and what it holds is changed without being moved.
///
/// If threads share a cell, they must ensure that only one of them at a time uses the value.
@safe final class Cell<Value: ~Copyable> {
    private let start: UnsafeMutablePointer<Value>

    init(_ value: consuming Value) {
        // Initialised here, released in `deinit`.
        unsafe start = .allocate(capacity: 1)
        unsafe start.initialize(to: value)
    }

    deinit {
        // This is the only owner.
        unsafe start.deinitialize(count: 1)
        unsafe start.deallocate()
    }

    @inline(__always) var value: Value {
        // It is there as long as the cell.
        unsafeAddress { unsafe UnsafePointer(start) }
        unsafeMutableAddress { unsafe start }
    }
}
