// SPDX-License-Identifier: Apache-2.0

import DomainXML

extension FuzzTarget {
    /// A domain of libvirt. What it becomes can be written as a document again, which is read as it was written.
    static let domain = FuzzTarget(name: "domain-xml", seeds: [small, devices].map { Array($0.utf8) }) { bytes in
        let isAccepted = run(bytes)
        // Most changes leave no XML; without control characters and broken UTF-8 there is some more.
        let isAcceptedAsText = run(bytes.map { $0 & 0x7f < 0x20 ? UInt8(ascii: " ") : $0 & 0x7f })
        return isAccepted || isAcceptedAsText
    }

    private static func run(_ bytes: [UInt8]) -> Bool {
        guard let first = try? Domain(bytes) else { return false }
        for note in first.notes { precondition(!note.description.isEmpty, "nothing is reported") }
        do throws(DomainError) {
            let text = try DomainWriter(name: first.name, first.definition, memory: 1 << 30).xml()
            let second = try Domain(Array(text.utf8))
            precondition(second.name == first.name, "\(second.name) was \(first.name)")
            let again = try DomainWriter(name: second.name, second.definition, memory: 1 << 30).xml()
            precondition(again == text, "\(again) was \(text)")
        } catch { fatalError("what was read cannot be written: \(error)") }
        return true
    }

    private static let small = """
        <domain type='kvm'><name>web</name><uuid>ea48ae98-f9f6-48c5-ad04-d8ec6fa95477</uuid><memory unit='MiB'>512</memory>\
        <vcpu placement='static'>2</vcpu><os><type arch='x86_64' machine='q35'>hvm</type><kernel>/k</kernel><cmdline>a &amp; b</cmdline></os>\
        <on_reboot>destroy</on_reboot><devices><serial type='file'><source path='/log,a' append='on'/></serial></devices></domain>
        """

    private static let devices = """
        <domain type='kvm'><name>db</name><metadata><s:machine xmlns:s='urn:swkvm:machine:1'><s:option name='hugepages' value='thp'/>\
        <s:option name='net' number='1' value='stream=/s'/><s:words option='disk' number='1' value='bps-burst=9'/></s:machine></metadata>\
        <memory>1048576</memory><memoryBacking><hugepages/><access mode='shared'/><allocation mode='immediate'/></memoryBacking>\
        <numatune><memnode cellid='0' mode='strict' nodeset='0-1'/></numatune><vcpu>2</vcpu>\
        <os><type>hvm</type><loader type='rom'>/bios.bin</loader></os><features><acpi/></features>\
        <cpu mode='host-passthrough'><numa><cell id='0' cpus='0' memory='512' unit='MiB'><distances><sibling id='1' value='20'/></distances></cell>\
        <cell id='1' cpus='1' memory='512' unit='MiB'/></numa></cpu><devices>\
        <disk type='file' device='disk'><driver type='qcow2' cache='none' queues='2'/><source file='/a.qcow2'/><target dev='vda' bus='virtio'/>\
        <backingStore type='file'><source file='/b/c.raw'/></backingStore><iotune><total_bytes_sec>1000</total_bytes_sec></iotune><serial>A</serial></disk>\
        <disk type='network'><driver type='raw'/><source protocol='nbd' name='x'><host name='h' port='1'/></source><readonly/></disk>\
        <interface type='bridge'><source bridge='br0'/><target dev='t0'/><mac address='52:54:00:12:34:56'/><mtu size='1400'/>\
        <bandwidth><inbound average='1' burst='2'/></bandwidth><model type='virtio'/></interface>\
        <interface type='user'><portForward proto='udp' address='::1'><range start='1' end='3' to='7'/></portForward></interface>\
        <interface type='direct'><source dev='e' mode='bridge'/></interface><interface type='network'><source network='swkvm0'/></interface>\
        <rng model='virtio'><rate bytes='9' period='1'/><backend model='random'>/dev/urandom</backend></rng></devices></domain>
        """
}
