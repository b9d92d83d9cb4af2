//! Words by which an agent tells what is wrong with a Pod, and what it has put back. A word that is not here counts as "another".

/// `PodReport.problem`: why a Pod is not proven.
pub const PROBLEMS: [&str; 10] = [
    "no_process",
    "host_network",
    "no_address",
    "ambiguous",
    "another_namespace",
    "outbound_not_captured",
    "inbound_not_captured",
    "no_certificate",
    "listener_closed",
    "released",
];

/// `PodReport.repaired` and `NodeReport.repaired`: pieces of a capture.
pub const PIECES: [&str; 25] = [
    // Of a Pod.
    "pods_entry",
    "original_destinations",
    "sk_lookup",
    "backstop",
    "listener",
    "listeners_entry",
    "probe_ports",
    "probe_vouches",
    "return_route",
    "return_rule",
    "setting",
    // Of a node.
    "connect4",
    "connect6",
    "bind4",
    "bind6",
    "getpeername4",
    "getpeername6",
    "getsockname4",
    "getsockname6",
    "connection_events",
    "socket_create",
    "pin",
    "heartbeat",
    "kubelet",
    "mesh_destinations",
];
