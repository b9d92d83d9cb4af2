//! Size of every kernel map, in one place, with its memory. An entry of a hash map costs at most key + value + 72 bytes, and each map
//! about 1 KiB; `MAP_MEMORY` adds it up.

/// Pods on a node (`PODS`, and the slots of `LISTENERS`). The kubelet's default limit is 110.
/// 1,024 × (8 + 72 + 72) B = 152 KiB.
pub const MAX_PODS: u32 = 1024;

/// Addresses of a Pod. Kubernetes gives two (dual stack).
pub const MAX_POD_ADDRESSES: usize = 4;

/// Redirected connections of *one Pod* between their connect and the agent's accept (its map in `ORIGINAL_DESTINATIONS`): twice
/// the agent's backlog. A Pod can keep entries for as long as it keeps sockets in SYN_SENT; so each has a map of its own, made at
/// enrolment and freed at release. 8,192 × (48 + 32 + 72) B = 1.2 MiB a Pod at most; entries are allocated
/// as used. Full: the connection has no entry, is counted, and the agent refuses it when it accepts. Other Pods do not notice.
pub const MAX_ORIGINAL_DESTINATIONS_PER_POD: u32 = 8_192;

/// Connects of the agent to applications on their way (`UPSTREAM_CONNECTIONS`): until the application's end is established.
/// 65,536 × (40 + 8 + 72) B = 7.5 MiB at most; allocated as used. The agent bounds its connects far below, in user space, and
/// refuses there. Should the map be full nevertheless, the connect is counted and steered to the agent's plaintext listener, as
/// one of the client that it shows: it does not reach the application, and passes no policy that this client would not.
pub const MAX_UPSTREAM_CONNECTIONS: u32 = 65_536;

/// Ports at which a Pod says that the kubelet asks it. Of more, mesh-control tells the first ones, and says so.
pub const MAX_PROBE_PORTS_PER_POD: usize = 16;

/// Entries of `PROBE_PORTS`: more there cannot be. 65,536 × (24 + 8 + 72) B = 6.5 MiB at most (the kernel rounds key
/// and value up to eight bytes); allocated as used.
pub const MAX_PROBE_PORTS: u32 = MAX_PODS * (MAX_POD_ADDRESSES * MAX_PROBE_PORTS_PER_POD) as u32;

/// Connects of the kubelet to *one Pod's* probe ports on their way (its map in `PROBE_VOUCHES`): it makes one for each probe at a
/// time. A Pod that does not answer keeps its entries until the kubelet gives up, so each has a map of its own. 64 × (40 + 8 + 72) B =
/// 7.5 KiB a Pod at most; allocated as used. Full: the probe is not vouched for, counted, and taken for anybody's plaintext.
pub const MAX_PROBE_VOUCHES_PER_POD: u32 = 64;

/// Entries of `LISTENERS`: 1,024 × 2 × 8 B = 16 KiB.
pub const MAX_LISTENERS: u32 = MAX_PODS * super::LISTENERS_PER_POD;

/// Prefixes that are in the mesh, or taken out of it (`MESH_DESTINATIONS`): the Pod ranges, services' addresses, and workloads
/// outside of the ranges. With its inner node each takes 128 B: 65,536 × 128 B = 8 MiB at most; allocated as used. Full: every
/// destination counts as the mesh's, and Pods reach the outside only by the agent; counted and logged.
pub const MAX_MESH_DESTINATIONS: u32 = 65_536;

/// IPv6 extension headers that are walked on the way to TCP. Real packets have one or two; behind more, a packet that a Pod sends
/// is dropped and counted.
pub const MAX_EXTENSION_HEADERS: u32 = 8;

/// What the kernel holds for a map at most, all entries used, on a machine with so many CPUs.
#[derive(Clone, Copy, Debug)]
pub struct MapMemory {
    /// Of its pin; `POD` is each Pod's own in `ORIGINAL_DESTINATIONS`, `VOUCHES_OF_POD` in `PROBE_VOUCHES`.
    pub name: &'static str,
    pub bytes: u64,
    pub bytes_per_cpu: u64,
}

/// `mesh-agent/tests/hooks/memory.rs` fills the maps and compares with what the kernel says. The storage of sockets is not in it:
/// it is memory of the sockets themselves, of which each may have `net.core.optmem_max`.
pub const MAP_MEMORY: [MapMemory; 15] = [
    hash("PODS", MAX_PODS, 8 + 72),
    array("HEARTBEAT", 8, 0),
    array("AGENT_SOCKETS", 0, 32),
    array("ORIGINAL_DESTINATIONS_OF_SOCKETS", 0, 32),
    hash("ORIGINAL_DESTINATIONS", MAX_PODS, 8 + 8),
    hash("POD", MAX_ORIGINAL_DESTINATIONS_PER_POD, 48 + 32),
    hash("UPSTREAM_CONNECTIONS", MAX_UPSTREAM_CONNECTIONS, 40 + 8),
    array("KUBELET", 16, 0),
    array("KUBELET_SOCKETS", 0, 32),
    hash("PROBE_PORTS", MAX_PROBE_PORTS, 24 + 8),
    hash("PROBE_VOUCHES", MAX_PODS, 8 + 8),
    hash("VOUCHES_OF_POD", MAX_PROBE_VOUCHES_PER_POD, 40 + 8),
    array("LISTENERS", MAX_LISTENERS as u64 * 8, 0),
    array("MESH_DESTINATIONS", MAX_MESH_DESTINATIONS as u64 * 128, 0),
    array("COUNTERS", super::Counter::COUNT as u64 * 8, super::Counter::COUNT as u64 * 8),
];

/// By CPU: its locks, and a spare entry.
const fn hash(name: &'static str, entries: u32, key_and_value: u64) -> MapMemory {
    let entry = key_and_value + HASH_ENTRY_BYTES;
    MapMemory {
        name,
        bytes: MAP_BYTES + entries as u64 * entry,
        bytes_per_cpu: 32 + entry,
    }
}

const fn array(name: &'static str, bytes: u64, bytes_per_cpu: u64) -> MapMemory {
    MapMemory {
        name,
        bytes: MAP_BYTES + bytes,
        bytes_per_cpu,
    }
}

/// Of a map without entries, about.
const MAP_BYTES: u64 = 1024;
/// Of an entry of a hash map beside its key and value, with its bucket.
const HASH_ENTRY_BYTES: u64 = 72;
