// SPDX-License-Identifier: Apache-2.0

extension DiskEngine {
    /// A first-in, first-out list of requests, linked through them.
    struct IndexList {
        var first: Int32 = -1
        var last: Int32 = -1
        var isEmpty: Bool { first < 0 }

        mutating func append(_ index: Int32, _ requests: Slab<Request>) {
            // Indices in lists are those of requests.
            requests[index].next = -1
            if isEmpty { first = index } else { requests[last].next = index }
            last = index
        }

        /// Appends another list, which is no list of its own any more.
        mutating func append(contentsOf other: IndexList, _ requests: Slab<Request>) {
            guard !other.isEmpty else { return }
            if isEmpty { first = other.first } else { requests[last].next = other.first }
            last = other.last
        }

        mutating func prepend(_ index: Int32, _ requests: Slab<Request>) {
            requests[index].next = first
            if isEmpty { last = index }
            first = index
        }

        mutating func popFirst(_ requests: Slab<Request>) -> Int32? {
            guard !isEmpty else { return nil }
            let index = first
            first = requests[index].next
            return index
        }
    }
}
