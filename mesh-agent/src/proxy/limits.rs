//! Every bound of the proxy, with its arithmetic.

use std::time::Duration;

/// Connections of a Pod, both directions together. 20,000 × (2 sockets, a task of about 20 KiB while idle) = 400 MB at most.
pub const CONNECTIONS_PER_POD: usize = 20_000;
/// Tunnels that others hold to a Pod. 1,024 × up to 200 streams; far above [`CONNECTIONS_PER_POD`].
pub const INBOUND_TUNNELS_PER_POD: usize = 1_024;
/// TLS handshakes at a time for a Pod's tunnel listener: 256 × about 40 KiB = 10 MiB, and 256 × 0.5 ms = 0.13 s of one core.
pub const HANDSHAKES_PER_POD: usize = 256;
/// Tunnels of a Pod to others.
pub const OUTBOUND_TUNNELS_PER_POD: usize = 1_024;

/// Streams that we put on one tunnel; further ones go to another.
pub const STREAMS_PER_OUTBOUND_TUNNEL: usize = 100;
/// Streams that a peer may put on one tunnel.
pub const STREAMS_PER_INBOUND_TUNNEL: u32 = 200;

/// What a stream may hold for a reader that does not read: 2 MiB a round trip, so 2 GB/s at 1 ms; an application's own kernel socket
/// may hold 6 MB. Released only as the slow side takes it.
pub const STREAM_WINDOW_BYTES: u32 = 2 * 1024 * 1024;
/// All streams of a tunnel full at once: 200 × 2 MiB = 400 MiB. So a stalled stream costs its own window and never holds up another;
/// a tunnel's memory is the sum of its stalled streams.
pub const CONNECTION_WINDOW_BYTES: u32 = STREAMS_PER_INBOUND_TUNNEL * STREAM_WINDOW_BYTES;
/// The largest frame that we take.
pub const FRAME_BYTES: u32 = 1024 * 1024;
/// What h2 keeps of a stream's data until the connection takes it.
pub const SEND_BUFFER_BYTES: usize = 256 * 1024;
/// Request headers of a CONNECT.
pub const HEADER_LIST_BYTES: u32 = 16 * 1024;

/// One read of a socket, at most; the buffer is held only while there is something in it.
pub const READ_BYTES: usize = 64 * 1024;

/// TCP connect to a peer's tunnel, to the application or to an outsider.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// From the CONNECT to its answer: the far side's discovery and its connect to the application.
pub const RESPONSE_TIMEOUT: Duration = Duration::from_secs(20);
/// An unknown address inside the Pod ranges, or a Pod whose protection is lost, waits this long for discovery.
/// Endpoints of a service that are tried for a connection: the chosen one, and one other when that refuses.
pub const ENDPOINT_TRIES: usize = 2;
pub const DISCOVERY_PATIENCE: Duration = Duration::from_secs(5);
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
