// SPDX-License-Identifier: Apache-2.0

/// What the guest gets when the host fails a request of a disk (`--on-disk-error`, as QEMU's `werror` and `rerror`).
public enum DiskErrorPolicy: String, Sendable, CaseIterable {
    /// An I/O error.
    case report
    /// Success, though the data is lost.
    case ignore
}
