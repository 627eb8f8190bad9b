// SPDX-License-Identifier: Apache-2.0

/// The machine as its firmware describes it to management software: what ``SMBIOSTables`` are built from.
///
/// Linux shows it in `/sys/class/dmi/id`, and `dmidecode` prints it.
public struct SMBIOSDescription: Sendable, Equatable {
    /// The identification of the processor.
    public struct Processor: Sendable, Equatable {
        /// `GenuineIntel`, …
        public var manufacturer: String
        /// The marketing name.
        public var version: String
        /// EAX of CPUID leaf 1 in the low half, EDX in the high half.
        public var id: UInt64

        public init(manufacturer: String, version: String, id: UInt64) {
            (self.manufacturer, self.version, self.id) = (manufacturer, version, id)
        }
    }

    /// The machine's name: the serial number of the system and the asset tag of its case.
    public var name: String
    /// 16 bytes in the order in which a UUID is written; all zero for a machine without one.
    public var uuid: [UInt8]
    /// The number of cores of each socket.
    public var sockets: [Int]
    public var processor: Processor
    /// Ranges of RAM, guest-physical, by ascending address.
    public var memory: [Range<UInt64>]

    public init(name: String, uuid: [UInt8], sockets: [Int], processor: Processor, memory: [Range<UInt64>]) {
        self.name = name
        self.uuid = uuid
        self.sockets = sockets
        self.processor = processor
        self.memory = memory
    }
}
