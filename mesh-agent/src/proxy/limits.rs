//! Every bound of the proxy, with its arithmetic. The constants are what a node runs with; [`Limits`] is what code takes them from, so
//! that a test can have smaller ones.
//!
//! Memory of a Pod at every bound at once: connections 400 MB, tunnels 2 × 1,024 × about 200 KiB (frame, TLS records, h2) = 400 MB,
//! data that waits [`POD_BUFFERED_BYTES`] = 128 MiB. Sockets' buffers are the kernel's and bounded by it (`tcp_mem`).

use std::time::Duration;

/// Connections of a Pod, both directions together. 20,000 × (2 sockets, a task of about 20 KiB while nothing waits) = 400 MB at most;
/// data that waits for a reader is counted apart.
pub const CONNECTIONS_PER_POD: usize = 20_000;
/// Connections from one address that the destination has not decided about. A decision waits some seconds when discovery contradicts
/// the peer; five such peers, not one, would fill a Pod's [`CONNECTIONS_PER_POD`].
pub const UNDECIDED_PER_SOURCE: usize = 4_000;
/// Descriptors that are nobody's connection: maps, links, pages, discovery, and five a Pod (its namespace, listeners, links, a lock):
/// enough for 180 Pods, where a node has 110 unless it was told otherwise.
pub const DESCRIPTORS_RESERVED: usize = 1_024;
/// A connection has at most so many: its two ends.
const DESCRIPTORS_PER_CONNECTION: usize = 2;
/// A Pod's connections may take one part in so many of the node's descriptors: where those are few, that is less than
/// [`CONNECTIONS_PER_POD`]. 20,000 descriptors leave (20,000 - 1,024) / 2 / 2 = 4,744 connections to a Pod; 81,024 leave it all of them.
const DESCRIPTOR_SHARES: usize = 2;
/// Tunnels that others hold to a Pod. 1,024 × up to 200 streams; far above [`CONNECTIONS_PER_POD`].
pub const INBOUND_TUNNELS_PER_POD: usize = 1_024;
/// Of those, from one address: a source's own 20,000 connections need 200.
pub const INBOUND_TUNNELS_PER_ADDRESS: usize = 256;
/// Of those, from all the addresses together that discovery does not know as members.
pub const INBOUND_TUNNELS_OF_STRANGERS: usize = 128;
/// TLS handshakes at a time for a Pod's tunnel listener: 256 × about 40 KiB = 10 MiB, and 256 × 0.5 ms = 0.13 s of one core.
pub const HANDSHAKES_PER_POD: usize = 256;
/// Of those, from one address: eight members, not one, would take all.
pub const HANDSHAKES_PER_ADDRESS: usize = 32;
/// Of those, from all strangers together: three quarters stay with members.
pub const HANDSHAKES_OF_STRANGERS: usize = 64;
/// Tunnels of a Pod to others.
pub const OUTBOUND_TUNNELS_PER_POD: usize = 1_024;

/// Streams that we put on one tunnel; further ones go to another.
pub const STREAMS_PER_OUTBOUND_TUNNEL: usize = 100;
/// Streams that a peer may put on one tunnel.
pub const STREAMS_PER_INBOUND_TUNNEL: u32 = 200;

/// Data of a Pod's connections that waits in the agent for a reader, both directions. Above it, the connections that have stalled
/// longest are reset (`memory_limit`), undecided ones first, until an eighth is free.
pub const POD_BUFFERED_BYTES: usize = 128 * 1024 * 1024;
/// The same for all Pods of the node; above it, the Pod that holds most gives way. So at least four Pods must stall to get there.
pub const NODE_BUFFERED_BYTES: usize = 512 * 1024 * 1024;
/// What a stream may hold for a reader that does not read: 2 MiB a round trip, so 2 GB/s at 1 ms; an application's own kernel socket
/// may hold 6 MB. Released only as the slow side takes it. Only while little waits: 16 stalled streams of this size are a quarter of
/// [`POD_BUFFERED_BYTES`], and above a quarter every tunnel of the Pod is told [`SCARCE_STREAM_WINDOW_BYTES`], until an eighth.
pub const STREAM_WINDOW_BYTES: u32 = 2 * 1024 * 1024;
/// 96 MiB, the other three quarters, hold 1,536 stalled streams of this; 64 MB/s at 1 ms for those that move.
pub const SCARCE_STREAM_WINDOW_BYTES: u32 = 64 * 1024;
/// All streams of a tunnel full at once, so that a stalled stream never holds up another. It bounds no memory: what arrives is taken
/// from the tunnel at once, and counted as its connection's.
pub const CONNECTION_WINDOW_BYTES: u32 = STREAMS_PER_INBOUND_TUNNEL * STREAM_WINDOW_BYTES;
/// Data that a peer may send before its CONNECT is answered: nothing is known of its right to send any.
pub const EARLY_BYTES: usize = 64 * 1024;
/// The largest frame that we take, as large as those that we send. A tunnel buffers one: 1,024 × 64 KiB = 64 MiB.
pub const FRAME_BYTES: u32 = 64 * 1024;
/// What h2 keeps of a stream's data until the tunnel's socket takes it. Counted like what waits for a reader.
pub const SEND_BUFFER_BYTES: usize = 256 * 1024;
/// Request headers of a CONNECT.
pub const HEADER_LIST_BYTES: u32 = 16 * 1024;

/// One read of a socket, at most; only into a place that it can go on to.
pub const READ_BYTES: usize = 64 * 1024;

/// TCP connect to a peer's tunnel, to the application or to an outsider.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// From a tunnel's accept to the first byte of its ClientHello, which a peer sends with its first packet.
pub const FIRST_BYTES_TIMEOUT: Duration = Duration::from_secs(2);
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// From the CONNECT to its answer: the far side's discovery and its connect to the application.
pub const RESPONSE_TIMEOUT: Duration = Duration::from_secs(20);
/// Ports that are tried for a connection to the application, where the kernel finds one from that very port that lives.
pub const UPSTREAM_TRIES: u32 = 4;
/// Endpoints of a service that are tried for a connection: the chosen one, and one other when that refuses.
pub const ENDPOINT_TRIES: usize = 2;
/// Ports of services whose endpoint is remembered for a Pod as a client (`sessionAffinity: ClientIP`). 1,024 × about 250 B = 256 KiB
/// a Pod. For further ones the endpoint is still the one that the client's address chooses, while the endpoints are the same.
pub const AFFINITIES_PER_POD: usize = 1_024;
/// An unknown address inside the Pod ranges, or a Pod whose protection is lost, waits this long for discovery.
pub const DISCOVERY_PATIENCE: Duration = Duration::from_secs(5);

/// How long a connection waits for the first certificate of its Pod's identity before it is refused.
pub const CERTIFICATE_PATIENCE: Duration = Duration::from_secs(2);
/// A peer whose identity contradicts discovery, and a policy that has not arrived, wait this long for something fresher.
pub const FRESHNESS_PATIENCE: Duration = Duration::from_secs(2);

pub const PING_INTERVAL: Duration = Duration::from_secs(10);
/// A ping without an answer for so long: the peer is gone.
pub const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// A tunnel of ours without a stream is closed after this.
pub const IDLE_TUNNEL: Duration = Duration::from_secs(90);
/// A tunnel of a peer's without a stream is closed after this; longer, so that its opener decides.
pub const IDLE_INBOUND_TUNNEL: Duration = Duration::from_secs(300);
/// A connection closed on one side that moves nothing for so long is reset. Open ones may be silent for ever: their ends decide.
pub const HALF_CLOSED_IDLE: Duration = Duration::from_secs(3600);
/// How long a Pod's release waits for its connections' tasks.
pub const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(5);
/// After a failed accept (no descriptors left, say), before the next.
pub const ACCEPT_RETRY: Duration = Duration::from_millis(50);

// The protocol's largest window (RFC 9113, 6.9.1) is not passed.
const _: () = assert!(CONNECTION_WINDOW_BYTES < (1 << 31));

/// How many at a time, and of them how many from one address and from strangers.
#[derive(Clone, Copy, Debug)]
pub struct QuotaLimits {
    pub total: usize,
    pub per_address: usize,
    pub strangers: usize,
}

/// The bounds that a [`super::Proxy`] has.
#[derive(Clone, Debug)]
pub struct Limits {
    pub connections_per_pod: usize,
    pub undecided_per_source: usize,
    pub inbound_tunnels: QuotaLimits,
    pub handshakes: QuotaLimits,
    pub outbound_tunnels_per_pod: usize,
    pub affinities_per_pod: usize,
    pub pod_buffered_bytes: usize,
    pub node_buffered_bytes: usize,
    pub first_bytes_timeout: Duration,
    pub handshake_timeout: Duration,
    pub response_timeout: Duration,
    pub ping_interval: Duration,
    pub ping_timeout: Duration,
    pub idle_tunnel: Duration,
    pub idle_inbound_tunnel: Duration,
    pub half_closed_idle: Duration,
}

impl Limits {
    /// Those of an agent that may have so many open descriptors: whoever takes all that a Pod may take leaves some to the others.
    #[must_use]
    pub fn for_descriptors(descriptors: usize) -> Self {
        let connections = descriptors.saturating_sub(DESCRIPTORS_RESERVED) / DESCRIPTORS_PER_CONNECTION;
        Self {
            connections_per_pod: CONNECTIONS_PER_POD.min(connections / DESCRIPTOR_SHARES),
            ..Self::default()
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_per_pod: CONNECTIONS_PER_POD,
            undecided_per_source: UNDECIDED_PER_SOURCE,
            inbound_tunnels: QuotaLimits {
                total: INBOUND_TUNNELS_PER_POD,
                per_address: INBOUND_TUNNELS_PER_ADDRESS,
                strangers: INBOUND_TUNNELS_OF_STRANGERS,
            },
            handshakes: QuotaLimits {
                total: HANDSHAKES_PER_POD,
                per_address: HANDSHAKES_PER_ADDRESS,
                strangers: HANDSHAKES_OF_STRANGERS,
            },
            outbound_tunnels_per_pod: OUTBOUND_TUNNELS_PER_POD,
            affinities_per_pod: AFFINITIES_PER_POD,
            pod_buffered_bytes: POD_BUFFERED_BYTES,
            node_buffered_bytes: NODE_BUFFERED_BYTES,
            first_bytes_timeout: FIRST_BYTES_TIMEOUT,
            handshake_timeout: HANDSHAKE_TIMEOUT,
            response_timeout: RESPONSE_TIMEOUT,
            ping_interval: PING_INTERVAL,
            ping_timeout: PING_TIMEOUT,
            idle_tunnel: IDLE_TUNNEL,
            idle_inbound_tunnel: IDLE_INBOUND_TUNNEL,
            half_closed_idle: HALF_CLOSED_IDLE,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_never_gets_more_than_half_of_the_descriptors() {
        for (descriptors, connections) in [(0, 0), (1_024, 0), (20_000, 4_744), (81_024, 20_000), (1 << 20, 20_000)] {
            let limits = Limits::for_descriptors(descriptors);
            assert_eq!(limits.connections_per_pod, connections, "{descriptors}");
            let taken = connections * DESCRIPTORS_PER_CONNECTION;
            assert!(taken <= descriptors.saturating_sub(DESCRIPTORS_RESERVED).div_ceil(DESCRIPTOR_SHARES));
        }
    }
}
