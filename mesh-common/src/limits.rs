//! Size of every kernel map, in one place, with its memory. An entry of a hash map costs about key + value + 64 bytes.

/// Pods on a node (`PODS`, and the slots of `LISTENERS`). The kubelet's default limit is 110.
/// 1,024 × (8 + 72 + 64) B = 144 KiB.
pub const MAX_PODS: u32 = 1024;

/// Addresses of a Pod. Kubernetes gives two (dual stack).
pub const MAX_POD_ADDRESSES: usize = 4;

/// Redirected connections of *one Pod* between their connect and the agent's accept (its map in `ORIGINAL_DESTINATIONS`): twice
/// the agent's backlog. A Pod can keep entries for as long as it keeps sockets in SYN_SENT; so each has a map of its own, made at
/// enrolment and freed at release. 8,192 × (48 + 32 + 64) B + 128 KiB of buckets = 1.3 MiB a Pod at most; entries are allocated
/// as used. Full: the connection has no entry, is counted, and the agent refuses it when it accepts. Other Pods do not notice.
pub const MAX_ORIGINAL_DESTINATIONS_PER_POD: u32 = 8_192;

/// Connects of the agent to applications on their way (`UPSTREAM_CONNECTIONS`): until the application's end is established.
/// 65,536 × (40 + 8 + 64) B = 7 MiB at most; allocated as used. The agent bounds its connects far below, in user space, and
/// refuses there. Should the map be full nevertheless, the connect is counted and steered to the agent's plaintext listener, as
/// one of the client that it shows: it does not reach the application, and passes no policy that this client would not.
pub const MAX_UPSTREAM_CONNECTIONS: u32 = 65_536;

/// Entries of `LISTENERS`: 1,024 × 2 × 8 B = 16 KiB.
pub const MAX_LISTENERS: u32 = MAX_PODS * super::LISTENERS_PER_POD;

/// Prefixes that are in the mesh, or taken out of it (`MESH_DESTINATIONS`): the Pod ranges, services' addresses, and workloads
/// outside of the ranges. With its inner node each takes 128 B: 65,536 × 128 B = 8 MiB at most; allocated as used. Full: every
/// destination counts as the mesh's, and Pods reach the outside only by the agent; counted and logged.
pub const MAX_MESH_DESTINATIONS: u32 = 65_536;

/// IPv6 extension headers that are walked on the way to TCP. Real packets have one or two; behind more, a packet that a Pod sends
/// is dropped and counted.
pub const MAX_EXTENSION_HEADERS: u32 = 8;
