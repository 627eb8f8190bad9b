#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# passt 0.0~git20230309 (Debian 12): IP packets in frames that are padded to Ethernet's minimum are dropped, without a message.
#
# A frame has at least 60 bytes before its checksum (IEEE 802.3); a shorter packet is padded with zeroes. "This padding is not
# part of the IP packet and is not included in the total length field of the IP header" (RFC 894; RFC 1042 says so, too): a
# receiver takes as many bytes as the header says and ignores the rest. passt drops each packet that does not end with its frame:
# TCP, UDP and ICMP over IPv4. ARP is not affected. IPv6 packets with TCP or UDP are never that short; with a few bytes behind
# them they are dropped as well. Without padding all are answered.
# TCP segments of up to 5 bytes, thus all plain acknowledgements, are that short unless they have options (timestamps, usually),
# and sending them again does not help. Later sources of passt accept bytes behind IPv4 packets.
# For a monitor: a guest's driver may pad (Linux's for e1000 does), so what is behind an IP packet has to be cut off before a
# frame goes to passt.
#
# Needed besides: unshare and ip, the right to make user and network namespaces, and IPv6.
. "$(dirname "$0")/support"
debian passt='0.0~git20230309.7c7625d-1'
export work
export -f debian_run
cat > guest.py <<'END'
import select, socket, struct, subprocess, time

MAC = bytes.fromhex("020000000001")
GUEST = {4: "198.51.100.2", 6: "2001:db8:1::2"}
SERVER = {4: "203.0.113.9", 6: "2001:db8:9::9"}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
PORT = 7777
SYN, PSH, ACK = 2, 8, 16
MSS = bytes.fromhex("020405b4")
ICMP, TCP, UDP = 1, 6, 17

def checksum(data):
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xffff) + (total >> 16)
    return total ^ 0xffff

def packed(version, address):
    return socket.inet_pton(FAMILY[version], address)

def packet(version, protocol, message, place):
    """An IP packet with the message, whose checksum is at the place."""
    source, target = packed(version, GUEST[version]), packed(version, SERVER[version])
    pseudo = b"" if protocol == ICMP else source + target + struct.pack("!II", len(message), protocol)
    message = message[:place] + struct.pack("!H", checksum(pseudo + message)) + message[place + 2:]
    if version == 6:
        return struct.pack("!IHBB", 6 << 28, len(message), protocol, 64) + source + target + message
    start, end = struct.pack("!BBHHHBB", 0x45, 0, 20 + len(message), 0, 0x4000, 64, protocol), source + target
    return start + struct.pack("!H", checksum(start + bytes(2) + end)) + end + message

def tcp(version, port, flags, sequence=1000, acknowledged=0, options=b"", data=b""):
    header = struct.pack("!HHIIBBHHH", port, PORT, sequence, acknowledged, 5 + len(options) // 4 << 4, flags, 64240, 0, 0)
    return packet(version, TCP, header + options + data, 16)

def udp(version, port, data):
    return packet(version, UDP, struct.pack("!HHHH", port, PORT, 8 + len(data), 0) + data, 6)

def icmp(identifier):
    return packet(4, ICMP, struct.pack("!BBHHH", 8, 0, 0, identifier, 1), 2)

def arp(asked):
    return struct.pack("!HHBBH6s4s6s4s", 1, 0x800, 6, 4, 1, MAC, packed(4, GUEST[4]), bytes(6), packed(4, asked))

class Answer:
    """What a frame of passt is, and to what: the port, the identifier or the address that was asked for."""
    def __init__(self, frame):
        self.what, self.to = "other", None
        kind, body = struct.unpack("!H", frame[12:14])[0], frame[14:]
        if kind == 0x806:
            self.what, self.to = "reply", socket.inet_ntop(socket.AF_INET, body[14:18])
            return
        protocol, message = (body[9], body[20:]) if kind == 0x800 else (body[6], body[40:])
        if protocol == TCP:
            self.to, self.sequence, self.acknowledged, flags = struct.unpack("!2xHII1xB", message[:14])
            self.what = "+".join(name for bit, name in ((2, "SYN"), (4, "RST"), (1, "FIN"), (16, "ACK")) if flags & bit)
        elif protocol == UDP:
            self.what, self.to = "datagram", struct.unpack("!2xH", message[:4])[0]
        elif protocol == ICMP and kind == 0x800:
            self.what, self.to = "reply" if message[0] == 0 else "error", struct.unpack("!H", message[4:6])[0]

stream, peer = socket.socketpair()
listener = socket.create_server((SERVER[4], PORT), backlog=64)
listener6 = socket.create_server((SERVER[6], PORT), backlog=64, family=socket.AF_INET6)
echo = {}
for version in (4, 6):
    echo[version] = socket.socket(FAMILY[version], socket.SOCK_DGRAM)
    echo[version].bind((SERVER[version], PORT))
number = peer.fileno()
words = ["passt", "-f", "--quiet", "--stderr", "--no-map-gw", "-t", "none", "-u", "none", "--fd", str(number)]
passt = subprocess.Popen(["bash", "-c", 'debian_run "$@"', "-"] + words, pass_fds=[number], stderr=open("passt.log", "w"))
peer.close()
received = b""

def send(payload, kind, length=0):
    """A frame of at least that length, as QEMU's stream protocol has it: after 32 bits with its length."""
    frame = bytes.fromhex("ffffffffffff") + MAC + struct.pack("!H", kind) + payload
    frame += bytes(max(0, length - len(frame)))
    stream.sendall(struct.pack("!I", len(frame)) + frame)

def answers(seconds):
    """The answers that arrive within that time; datagrams to the server are sent back meanwhile."""
    global received
    end = time.monotonic() + seconds
    while True:
        while len(received) >= 4 and len(received) >= 4 + struct.unpack("!I", received[:4])[0]:
            size = 4 + struct.unpack("!I", received[:4])[0]
            frame, received = received[4:size], received[size:]
            yield Answer(frame)
        ready = select.select([stream, *echo.values()], [], [], max(0, end - time.monotonic()))[0]
        if not ready:
            return
        for source in ready:
            data, sender = source.recvfrom(1 << 16)
            if source is not stream:
                source.sendto(data, sender)
            elif not data:
                raise SystemExit("passt has ended:\n" + open("passt.log").read())
            else:
                received += data

def first(to, seconds=20):
    return next((answer for answer in answers(seconds) if answer.to == to), None)

def row(name, make, kind, keys, length):
    """Asks with padding, then without, by another key, so that the second answer is no answer to the first question."""
    padded, plain = make(keys[0]), make(keys[1])
    send(padded, kind, length)
    send(plain, kind)
    seen, end = {}, 20
    while end:
        for answer in answers(end):
            if answer.to in keys:
                seen.setdefault(answer.to, answer.what)
            if end > 1 and keys[1] in seen:
                break
        # The answer to what was sent first would be here by now. It gets another second.
        end = 1 if end > 1 else 0
    result = [seen.get(key, "no answer") for key in (keys[1], keys[0])]
    print(f"{name:32}{14 + len(plain):5}  {result[0]:11}{max(length, 14 + len(plain)):6}  {result[1]}")

print(f"{'':32}{'bytes':>5}  {'':11}{'padded':>6}")
row("ARP request", arp, 0x806, ("198.51.100.1", "198.51.100.7"), 60)
row("IPv4, ICMP echo request", icmp, 0x800, (21, 22), 60)
row("IPv4, UDP, 1 byte", lambda port: udp(4, port, b"x"), 0x800, (40001, 40002), 60)
row("IPv4, UDP, 17 bytes", lambda port: udp(4, port, b"x" * 17), 0x800, (40003, 40004), 60)
row("IPv4, TCP, SYN", lambda port: tcp(4, port, SYN), 0x800, (40011, 40012), 60)
row("IPv4, TCP, SYN, maximum size", lambda port: tcp(4, port, SYN, options=MSS), 0x800, (40013, 40014), 60)
row("IPv6, UDP, 1 byte", lambda port: udp(6, port, b"x"), 0x86dd, (40001, 40002), 64)
row("IPv6, TCP, SYN", lambda port: tcp(6, port, SYN), 0x86dd, (40011, 40012), 76)

# One connection: five bytes with padding, twice, then without it, then six, which need none.
send(tcp(4, 40021, SYN), 0x800)
start = first(40021)
if start is None or start.what != "SYN+ACK":
    raise SystemExit("the connection is not established")
acknowledged = start.sequence + 1
send(tcp(4, 40021, ACK, 1001, acknowledged), 0x800)
segment = tcp(4, 40021, ACK | PSH, 1001, acknowledged, data=b"hello")
for attempt in ("", ", again"):
    send(segment, 0x800, 60)
    answer = next((answer for answer in answers(1) if answer.to == 40021 and answer.acknowledged > 1001), None)
    print(f"five bytes, padded to 60{attempt}: {'no answer' if answer is None else 'acknowledged'}")
for text, sequence, data in (("five bytes, not padded", 1001, b"hello"), ("six bytes, a frame of 60", 1006, b" world")):
    send(tcp(4, 40021, ACK | PSH, sequence, acknowledged, data=data), 0x800)
    answer = next((a for a in answers(20) if a.to == 40021 and a.acknowledged == sequence + len(data)), None)
    print(f"{text}: {'no answer' if answer is None else 'acknowledged'}")
stream.close()
print(f"then passt ends with status {passt.wait(20)}")
END
cat > network <<'END'
ip link set lo up
ip link add out0 type veth peer name out1
ip link set out0 up
ip link set out1 up
ip address add 198.51.100.2/24 dev out0
ip address add 2001:db8:1::2/64 dev out0 nodad
ip address add 203.0.113.9/32 dev out1
ip address add 2001:db8:9::9/128 dev out1 nodad
ip route add default via 198.51.100.1 dev out0
ip -6 route add default via 2001:db8:1::1 dev out0
# passt's user may send echo requests.
echo 0 0 > /proc/sys/net/ipv4/ping_group_range
exec python3 guest.py
END
unshare --map-root-user --net bash -e network > seen || { cat seen; exit 1; }
expect seen <<'END'
                                bytes             padded
ARP request                        42  reply          60  reply
IPv4, ICMP echo request            42  reply          60  no answer
IPv4, UDP, 1 byte                  43  datagram       60  no answer
IPv4, UDP, 17 bytes                59  datagram       60  no answer
IPv4, TCP, SYN                     54  SYN+ACK        60  no answer
IPv4, TCP, SYN, maximum size       58  SYN+ACK        60  no answer
IPv6, UDP, 1 byte                  63  datagram       64  no answer
IPv6, TCP, SYN                     74  SYN+ACK        76  no answer
five bytes, padded to 60: no answer
five bytes, padded to 60, again: no answer
five bytes, not padded: acknowledged
six bytes, a frame of 60: acknowledged
then passt ends with status 0
END
