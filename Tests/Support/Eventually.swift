// SPDX-License-Identifier: Apache-2.0

import Glibc

/// Waits until `condition` holds, for as long as ten seconds: for what another thread is about to do, and for what a
/// process leaves behind for a moment.
///
/// The kernel takes an interface down after its descriptor's last holder has gone, which may be a process that another
/// test is just starting: it has all of this one's descriptors until its exec.
public func eventually(_ condition: () throws -> Bool) throws -> Bool {
    for _ in 0..<1_000 {
        if try condition() { return true }
        usleep(10_000)
    }
    return try condition()
}
