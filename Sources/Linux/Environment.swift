// SPDX-License-Identifier: Apache-2.0

internal import Glibc

/// The value of a variable of the environment (environ(7)), whose bytes need not be UTF-8; nil if it is not set.
///
/// No thread of this program changes the environment.
public func environmentVariable(_ name: String) -> String? {
    // A string of the environment, which stays as it is.
    guard let value = unsafe getenv(name) else { return nil }
    return unsafe String(raw: UnsafeBufferPointer(start: value, count: strlen(value)).map { UInt8(bitPattern: $0) })
}
