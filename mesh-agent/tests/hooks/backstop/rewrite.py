# What the root of a Pod does to the packets of sockets that are not its own: a NAT rule of nftables at the Pod's output, by its own
# netlink messages (include/uapi/linux/netfilter/nf_tables.h), for machines without the command.
def attribute(kind, value):
    value = value if isinstance(value, bytes) else b"".join(value)
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)
def nested(kind, *values): return attribute(kind | 0x8000, values)
def number(kind, value): return attribute(kind, struct.pack("!I", value))
def name(kind, text): return attribute(kind, text.encode() + b"\0")
def expression(kind, *values): return nested(1, name(1, kind), nested(2, *values)) # NFTA_LIST_ELEM
def immediate(register, value): return expression("immediate", number(1, register), nested(2, attribute(1, value)))

def rewrite(to, port):
    """Everything that a socket of the Pod begins to send goes there instead."""
    is_v6 = ":" in to
    family, address = (10, socket.inet_pton(socket.AF_INET6, to)) if is_v6 else (2, socket.inet_pton(socket.AF_INET, to))
    table = name(1, "rewrite")
    chain = [table, name(3, "output"), nested(4, number(1, 3), number(2, 2**32 - 100)), name(7, "nat")] # LOCAL_OUT, before routing
    nat = expression("nat", number(1, 1), number(2, family), number(3, 1), number(5, 2)) # DNAT: register 1, and the port of 2
    rule = [table, name(2, "output"), nested(4, immediate(1, address), immediate(2, struct.pack("!H", port)), nat)]
    create, ack = 0x400, 4
    # The table may be there: made, deleted and made anew, in one transaction.
    messages = [(0, create, [table]), (2, 0, [table]), (0, create, [table]), (3, create, chain), (6, create | 0x800, rule)]
    def message(kind, flags, of, resource, body):
        body = struct.pack("!BBH", of, 0, resource) + b"".join(body)
        return struct.pack("=IHHII", 16 + len(body), kind, 1 | flags, 1, 0) + body
    batch = message(16, 0, 0, 10, [])
    for kind, flags, body in messages: batch += message(10 << 8 | kind, flags | ack, family, 0, body)
    batch += message(17, 0, 0, 10, [])
    s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
    s.settimeout(10)
    s.send(batch)
    acknowledged = 0
    while acknowledged < len(messages):
        answer = s.recv(65536)
        while answer:
            length, kind = struct.unpack_from("=IH", answer)
            error = struct.unpack_from("=i", answer, 16)[0] if kind == 2 else 0
            if error: raise OSError(-error, "nftables")
            acknowledged += kind == 2
            answer = answer[(length + 3) & ~3:]
