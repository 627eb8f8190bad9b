// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import HostNetwork
internal import Linux

extension NetworkNamespace {
    /// Moves the calling thread, and no other, into a new namespace that has nothing but a `lo` that is down.
    public static func enterNew() throws(HostNetworkError) {
        guard clinux_unshare_network() < 0 else { return }
        throw .refused(action: "making a network namespace", .last("unshare"), explanation: "")
    }
}
