// SPDX-License-Identifier: Apache-2.0

/// How far the commit of an image is. There is one at a time, which the engine runs that began it, for all.
struct CommitState {
    /// What is being synchronised.
    enum Step { case none, data, allocation, allocationTable, mapping }

    /// A synchronisation that the engine is to carry out.
    struct Synchronization {
        /// The number of the file.
        let file: Int
        /// Indicates whether it is the file with the data, where that is one of its own.
        let isOfData: Bool
    }

    /// What the engine that runs a commit does next.
    enum Action {
        case synchronize(Synchronization)
        /// The same; the mapping has been written, and must be unlocked.
        case synchronizeMapping(Synchronization)
        /// It is over, and must be ended by ``SharedImage/endCommit(_:)``.
        case end(MetadataError?)
    }

    private(set) var step = Step.none
    /// Which of the image's files is being synchronised.
    private(set) var file = 0
    /// The number of the engine that runs it.
    private(set) var engine = -1
    /// Indicates whether another has to follow.
    private(set) var isWanted = false

    /// Begins a commit, or has one follow the one under way. Returns whether it began.
    mutating func begin(by engine: AttachedEngine) -> Bool {
        isWanted = step != .none
        if !isWanted { self.engine = engine.number }
        return !isWanted
    }

    mutating func synchronize(_ step: Step, file: Int = 0) {
        self.step = step
        self.file = file
    }

    /// Holds the next commit back while all is said of one that may have ended before its first step.
    mutating func hold() {
        if step == .none { step = .mapping }
    }

    mutating func end() { step = .none }

    /// Aborts the commit in progress.
    /// - Parameter isWanted: whether another engine is to run it.
    mutating func abort(isWanted: Bool) {
        step = .none
        self.isWanted = isWanted
    }

    func isRun(by engine: AttachedEngine) -> Bool { step != .none && self.engine == engine.number }
}
