# What an attacker with CAP_NET_RAW builds packets with. `PEER_MAC` and the addresses of both ends are set by the test.
import mmap

TCP, SYN, ACK, UDP, ICMP6 = 6, 2, 16, 17, 58
V4, V6 = 0x0800, 0x86dd
ends = {V4: (POD_V4, PEER_V4), V6: (POD_V6, PEER_V6)}
family_of = {V4: socket.AF_INET, V6: socket.AF_INET6}

def packed(address): return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
def summed(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while total >> 16: total = (total & 0xffff) + (total >> 16)
    return total ^ 0xffff
def tcp(source, to, port, flags=SYN, payload=b""):
    header = lambda check: struct.pack("!HHIIBBHHH", 40000, port, 1, 1 if flags & ACK else 0, 5 << 4, flags, 1024, check, 0)
    pseudo = packed(source) + packed(to) + struct.pack("!II", 20 + len(payload), TCP)
    return header(summed(pseudo + header(0) + payload)) + payload
def v4(source, to, payload, protocol=TCP, fragment=0, options=b"", version=4):
    words = 5 + len(options) // 4
    header = lambda check: struct.pack("!BBHHHBBH", version << 4 | words, 0, words * 4 + len(payload), 7, fragment, 64, protocol, check) + packed(source) + packed(to) + options
    return header(summed(header(0))) + payload
def v6(source, to, payload, protocol=TCP):
    return struct.pack("!IHBB", 6 << 28, len(payload), protocol, 64) + packed(source) + packed(to) + payload
def plain(of, port, flags=SYN, source=None, to=None):
    source, to = source or ends[of][0], to or ends[of][1]
    return (v4 if of == V4 else v6)(source, to, tcp(source, to, port, flags))

# Extension headers: (number, bytes without the first one); the chain ends with TCP.
PADDED = b"\0" + b"\1\4\0\0\0\0"
def chained(port, *extensions, to=PEER_V6):
    body, following = tcp(POD_V6, to, port), TCP
    for number, rest in reversed(extensions):
        body, following = bytes([following]) + rest + body, number
    return v6(POD_V6, to, body, following)
def v4_fragments(port, *cuts, payload=b""):
    whole = tcp(POD_V4, PEER_V4, port, payload=payload)
    cuts = [0, *cuts, len(whole)]
    return [v4(POD_V4, PEER_V4, whole[a:b], fragment=a // 8 | (0x2000 if b < len(whole) else 0)) for a, b in zip(cuts, cuts[1:])]
def v6_fragments(port, *cuts, extension=b"", payload=b""):
    whole = extension + tcp(POD_V6, PEER_V6, port, payload=payload)
    first = 60 if extension else TCP
    cuts = [0, *cuts, len(whole)]
    return [v6(POD_V6, PEER_V6, struct.pack("!BBHI", first, 0, a | (b < len(whole)), 9) + whole[a:b], 44) for a, b in zip(cuts, cuts[1:])]

def send_raw(of, packets):
    s = socket.socket(family_of[of], socket.SOCK_RAW, socket.IPPROTO_RAW)
    if of == V6: s.setsockopt(socket.IPPROTO_IPV6, 36, 1) # IPV6_HDRINCL
    for packet in packets: s.sendto(packet, (ends[of][1], 0))
def send_packet(of, packets):
    s = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
    for packet in packets: s.sendto(packet, ("eth0", of, 0, 0, PEER_MAC))
def send_frame(of, packets, tags=b""):
    s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    s.bind(("eth0", 0))
    for packet in packets: s.send(PEER_MAC + b"\2\0\0\0\0\1" + tags + struct.pack("!H", of) + packet)
# From a ring in shared memory, whose packets the kernel keeps in pages of their own.
def send_ring(of, packets):
    s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    s.setsockopt(263, 10, 1) # PACKET_VERSION: TPACKET_V2
    s.setsockopt(263, 13, struct.pack("IIII", 4096, 1, 2048, 2)) # PACKET_TX_RING
    s.bind(("eth0", 0))
    ring = mmap.mmap(s.fileno(), 4096)
    for packet in packets:
        frame = PEER_MAC + b"\2\0\0\0\0\1" + struct.pack("!H", of) + packet
        start = 32 # TPACKET2_HDRLEN without sockaddr_ll
        ring[start:start + len(frame)] = frame
        ring[4:8] = struct.pack("I", len(frame))
        ring[0:4] = struct.pack("I", 1) # TP_STATUS_SEND_REQUEST
        s.send(b"")
