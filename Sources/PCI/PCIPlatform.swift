// SPDX-License-Identifier: Apache-2.0

public import Linux

/// A message-signalled interrupt as a guest writes it into a table: the write that the function makes.
public struct MSIMessage: Sendable, Equatable {
    public var address: UInt64
    public var data: UInt32

    public init(address: UInt64 = 0, data: UInt32 = 0) { (self.address, self.data) = (address, data) }

    /// Indicates whether the write is to the local APICs (Intel SDM volume 3, §11.11.1). No other one is made.
    public var isInterrupt: Bool { address >> 20 == 0xfee }
}

/// The host refused to connect something of a function.
public struct PCIRefusal: Error, CustomStringConvertible {
    public let description: String
    public init(_ description: String) { self.description = description }
}

/// What a function needs of the machine that it is in. Any thread calls it; nothing of it is on the way of a request.
public protocol PCIPlatform: AnyObject, Sendable {
    /// Gives a message a route.
    func addRoute(_ message: MSIMessage) throws(PCIRefusal) -> UInt32
    /// Changes what a route sends. An interrupt on its way is the one or the other.
    func changeRoute(_ route: UInt32, to message: MSIMessage) throws(PCIRefusal)
    func removeRoute(_ route: UInt32)

    /// Has each signal of an eventfd send a route's message. One that came before is sent now, and taken.
    func connect(_ event: borrowing EventFD, to route: UInt32) throws(PCIRefusal)
    /// Ends that. A signal that comes before this returns is sent, or stays in the eventfd.
    func disconnect(_ event: borrowing EventFD, from route: UInt32)

    /// Has each write to an address signal an eventfd.
    func connectDoorbell(_ event: borrowing EventFD, at address: UInt64) throws(PCIRefusal)
    func disconnectDoorbell(_ event: borrowing EventFD, at address: UInt64)

    /// Asserts or deasserts the function's INTA#.
    func setInterruptPin(_ isAsserted: Bool)
}
