// SPDX-License-Identifier: Apache-2.0

/// An element of a slab that is in one list at a time, linked to the next one.
protocol ListElement {
    /// The index of the next element of the list; -1 for the last.
    var next: Int32 { get set }
}

/// A list of elements of a slab, linked through them: it has no memory of its own.
struct IndexList<Element: ListElement> {
    private var first: Int32 = -1
    private var last: Int32 = -1

    var isEmpty: Bool { first < 0 }

    mutating func append(_ index: Int32, _ elements: Slab<Element>) {
        elements[index].next = -1
        if isEmpty { first = index } else { elements[last].next = index }
        last = index
    }

    /// Appends another list, which is no list of its own any more.
    mutating func append(contentsOf other: IndexList, _ elements: Slab<Element>) {
        guard !other.isEmpty else { return }
        if isEmpty { first = other.first } else { elements[last].next = other.first }
        last = other.last
    }

    mutating func prepend(_ index: Int32, _ elements: Slab<Element>) {
        elements[index].next = first
        if isEmpty { last = index }
        first = index
    }

    mutating func popFirst(_ elements: Slab<Element>) -> Int32? {
        guard !isEmpty else { return nil }
        let index = first
        first = elements[index].next
        return index
    }

    /// The list as it is, which this one gives away: it is empty afterwards.
    mutating func take() -> IndexList {
        let taken = self
        self = IndexList()
        return taken
    }

    /// Calls `body` with each index, in the list's order.
    func forEach(_ elements: Slab<Element>, _ body: (Int32) -> Void) {
        var index = first
        while index >= 0 {
            let next = elements[index].next
            body(index)
            index = next
        }
    }
}
