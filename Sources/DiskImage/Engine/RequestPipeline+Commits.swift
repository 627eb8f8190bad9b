// SPDX-License-Identifier: Apache-2.0

/// What the engine that runs a commit does for all: ``SharedImage`` knows the steps.
extension RequestPipeline {
    /// Begins a commit, or has one follow the one under way.
    mutating func startCommit() {
        if let action = shared.beginCommit(by: attachment) { carryOut(action) }
    }

    mutating func carryOut(_ action: CommitState.Action) {
        switch action {
        case .synchronize(let synchronization):
            operations.enqueueCommit(synchronization)
        case .synchronizeMapping(let synchronization):
            operations.enqueueCommit(synchronization)
            unlockMapping()
        case .end(let error):
            unlockMapping()
            shared.endCommit(error)
            completeFlushes()
            retryWaiting()
            if shared.needsCommit { startCommit() }
        }
    }

    private mutating func unlockMapping() {
        guard image.isLocked else { return }
        image.unlock()
        linkDeferred()
        retryWaiting()
    }

    /// Finishes the writes that ended while the mapping was locked.
    mutating func linkDeferred() {
        var deferred = attachment.takeDeferred()
        while let index = deferred.popFirst(attachment.operations) { end(index, 0) }
    }

    /// The flushes whose commit has ended come back.
    mutating func completeFlushes() {
        while let index = attachment.popCommitted() { complete(index) }
    }
}
