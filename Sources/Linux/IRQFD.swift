// SPDX-License-Identifier: Apache-2.0

/// An eventfd that a machine assigns to an interrupt (irqfd): signalling it interrupts the guest.
public final class IRQFD: Sendable {
    public let event: EventFD
    public init() throws(SystemCallError) { event = try EventFD() }
}
