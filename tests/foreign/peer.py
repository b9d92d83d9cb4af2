"""A peer of the tunnel that shares nothing with Culvert: Debian's python3-h2 over Python's ssl (OpenSSL).

peer.py client CERT KEY ROOT HOST AUTHORITY CLAIMS   opens a CONNECT to HOST:15008, echoes one line, half-closes; JSON on stdout
peer.py server CERT KEY ROOT                         accepts tunnels on port 15008 and echoes; a JSON line for each CONNECT
"""
import json
import socket
import ssl
import sys
import threading

import h2.config
import h2.connection
import h2.events

PORT = 15008
LINE = b"through a foreign peer\n"


def context(side, root):
    tls = ssl.SSLContext(side)
    tls.minimum_version = ssl.TLSVersion.TLSv1_3
    tls.check_hostname = False
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.load_verify_locations(root)
    return tls


def configuration(client_side):
    # h2 4.1 asks for :scheme and :path in every request; a CONNECT has neither (RFC 9113 section 8.5).
    return h2.config.H2Configuration(
        client_side=client_side, validate_inbound_headers=False, validate_outbound_headers=False)


def identity(tls):
    return [value for kind, value in tls.getpeercert().get("subjectAltName", ()) if kind == "URI"]


def claiming(tls, cert, key, claims):
    """As CLAIMS (JSON) has it: {"certificate": false} shows none, {"alpn": false} names no protocol, {"tls12": true}."""
    if claims["certificate"]:
        tls.load_cert_chain(cert, key)
    if claims["alpn"]:
        tls.set_alpn_protocols(["h2"])
    if claims["tls12"]:
        tls.minimum_version = tls.maximum_version = ssl.TLSVersion.TLSv1_2
    return tls


def client(cert, key, root, host, authority, claims):
    """The report is printed also when TLS refuses us: a refusal is an answer, and any other exception a fault of this script."""
    report = {"echoed": False}
    try:
        tunnel(cert, key, root, host, authority, json.loads(claims), report)
    except (ssl.SSLError, ConnectionResetError, BrokenPipeError) as error:
        report["refused"] = str(error)
    print(json.dumps(report), flush=True)


def tunnel(cert, key, root, host, authority, claims, report):
    raw = socket.create_connection((host, PORT), timeout=10)
    tls = claiming(context(ssl.PROTOCOL_TLS_CLIENT, root), cert, key, claims).wrap_socket(raw)
    connection = h2.connection.H2Connection(configuration(client_side=True))
    connection.initiate_connection()
    report.update(alpn=tls.selected_alpn_protocol(), version=tls.version(), server=identity(tls))
    connection.send_headers(1, [
        (":method", "CONNECT"),
        (":authority", authority),
        ("baggage", "k8s.cluster.name=elsewhere,k8s.namespace.name=shop"),
        ("forwarded", claims["forwarded"] or "for=\"203.0.113.9:1\""),
    ])
    tls.sendall(connection.data_to_send())
    received, ended = b"", False
    while not ended:
        data = tls.recv(65536)
        if not data:
            report["closed"] = True
            break
        for event in connection.receive_data(data):
            # The server's first frame comes once it has taken the certificate: in TLS 1.3 our side of the handshake ends before.
            report["answered"] = True
            if isinstance(event, h2.events.ResponseReceived):
                headers = {name.decode() if isinstance(name, bytes) else name:
                           value.decode() if isinstance(value, bytes) else value for name, value in event.headers}
                report["status"] = headers[":status"]
                if headers[":status"] != "200":
                    ended = True
                else:
                    connection.send_data(1, LINE, end_stream=True)
            elif isinstance(event, h2.events.DataReceived):
                received += event.data
                connection.acknowledge_received_data(event.flow_controlled_length, 1)
            elif isinstance(event, h2.events.StreamEnded):
                report["half_close_answered"] = True
                ended = True
            elif isinstance(event, h2.events.StreamReset):
                report["reset"] = int(event.error_code)
                ended = True
        tls.sendall(connection.data_to_send())
    report["echoed"] = received == LINE


def serve_tunnel(raw, tls_context):
    try:
        tls = tls_context.wrap_socket(raw, server_side=True)
    except (ssl.SSLError, OSError) as error:
        print(json.dumps({"handshake": str(error)}), flush=True)
        return
    connection = h2.connection.H2Connection(configuration(client_side=False))
    connection.initiate_connection()
    tls.sendall(connection.data_to_send())
    while True:
        data = tls.recv(65536)
        if not data:
            return
        for event in connection.receive_data(data):
            if isinstance(event, h2.events.RequestReceived):
                headers = {name.decode() if isinstance(name, bytes) else name:
                           value.decode() if isinstance(value, bytes) else value for name, value in event.headers}
                print(json.dumps({"client": identity(tls), "alpn": tls.selected_alpn_protocol(), "headers": headers}), flush=True)
                connection.send_headers(event.stream_id, [(":status", "200")])
            elif isinstance(event, h2.events.DataReceived):
                connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                if event.data:
                    connection.send_data(event.stream_id, event.data)
            elif isinstance(event, h2.events.StreamEnded):
                connection.end_stream(event.stream_id)
        tls.sendall(connection.data_to_send())


def server(cert, key, root):
    tls_context = claiming(context(ssl.PROTOCOL_TLS_SERVER, root), cert, key, {"certificate": True, "alpn": True, "tls12": False})
    # Dual-stack: IPv4 comes as v4-mapped.
    listener = socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True)
    print(json.dumps({"listening": PORT}), flush=True)
    while True:
        raw, _ = listener.accept()
        threading.Thread(target=serve_tunnel, args=(raw, tls_context), daemon=True).start()


if __name__ == "__main__":
    {"client": client, "server": server}[sys.argv[1]](*sys.argv[2:])
