// SPDX-License-Identifier: Apache-2.0

public import Linux
internal import CLinux

/// An error of `/dev/kvm` or of one of its ioctls.
public enum KVMError: Error, CustomStringConvertible {
    /// The device could not be opened.
    case unavailable(path: String, SystemCallError)
    /// The kernel has another version of the interface.
    case version(found: Int32)
    /// The host's KVM lacks a capability that every machine requires.
    case missing(Capability)
    /// More vCPUs than this host's KVM allows in one machine.
    case tooManyCPUs(wanted: Int, maximum: Int)
    /// All GSIs that this host's KVM routes are in use.
    case noInterruptLeft(limit: Int)
    /// An ioctl failed; `purpose` completes "KVM refused to …".
    case refused(purpose: String, SystemCallError)

    public var description: String {
        switch self {
        case .unavailable(let path, let error) where error.errno == ENOENT:
            "\(path) does not exist: load the module (`modprobe kvm_intel` or `modprobe kvm_amd`), or, in a virtual machine, enable nested virtualization on its host"
        case .unavailable(let path, let error) where error.errno == EACCES || error.errno == EPERM:
            "\(path) cannot be opened by this user (\(error.reason)): add the user to the group `kvm` (`usermod -aG kvm $USER`, then log in again), or run as root"
        case .unavailable(let path, let error):
            "\(path) cannot be opened for reading and writing: \(error.reason)"
        case .version(let found):
            "KVM has API version \(found), expected \(KVM_API_VERSION): this kernel is older than Linux 2.6.22, or \(found < 0 ? "the file is not the KVM device" : "newer than swkvm")"
        case .missing(let capability):
            "this host's KVM lacks \(capability.name), which swkvm needs: use a newer kernel"
        case .tooManyCPUs(let wanted, let maximum):
            "\(wanted) vCPUs were requested, but this host's KVM allows \(maximum) per machine: use `--cpus \(maximum)` or fewer"
        case .noInterruptLeft(let limit):
            "all \(limit) interrupt routes of this host's KVM are in use: use fewer devices, or fewer queues"
        case .refused(let purpose, let error):
            "KVM refused to \(purpose): \(error.reason) (\(error.call))"
        }
    }
}

/// Gives a failed call the purpose that the error's sentence names.
func refusing<Result: ~Copyable>(
    _ purpose: @autoclosure () -> String, _ call: () throws(SystemCallError) -> Result
) throws(KVMError) -> Result {
    do throws(SystemCallError) { return try call() } catch { throw .refused(purpose: purpose(), error) }
}
