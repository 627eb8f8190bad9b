// SPDX-License-Identifier: Apache-2.0

internal import Devices
internal import GuestMemory

/// What a machine's balloon has to be like.
extension Configuration {
    /// Refuses a balloon that does not fit the machine's memory.
    /// - Throws: `balloon`.
    public func checkBalloon() throws(MachineError) {
        guard let balloon else { return }
        try checkBalloon(target: balloon.target)
        guard balloon.reportsFreePages || balloon.hintsFreePages, case .hugePages = memory.backing else { return }
        throw .balloon(.freePagesOfPool)
    }

    /// Refuses an amount of memory that the guest cannot give up: the same error.
    func checkBalloon(target: UInt64) throws(MachineError) {
        guard target % BalloonSettings.pageSize == 0 else { throw .balloon(.notPages(target)) }
        guard target <= min(memory.size, BalloonSettings.maximumTarget) else {
            throw .balloon(.largerThanMemory(target: target, memory: memory.size))
        }
    }

    /// Why a machine cannot have a balloon as configured; sizes in bytes.
    public enum BalloonProblem: Error, Equatable, Sendable, CustomStringConvertible {
        /// More than the guest has.
        case largerThanMemory(target: UInt64, memory: UInt64)
        /// A size that is not a multiple of 4 KiB.
        case notPages(UInt64)
        /// Reports or hints of free memory, where the host's pages are those of a pool.
        case freePagesOfPool

        public var description: String {
            switch self {
            case .largerThanMemory(let target, let memory):
                "a balloon of \(byteText(target)) exceeds the guest's \(byteText(memory)) of memory: request less"
            case .notPages(let target):
                "a balloon of \(target) bytes is not a multiple of 4 KiB; the next one is \(target / 4096 * 4096 &+ 4096)"
            case .freePagesOfPool:
                "reports and hints of free memory cannot be combined with huge pages of a pool: the guest would end when it uses memory again that another program has taken; use `--hugepages thp`"
            }
        }
    }
}
