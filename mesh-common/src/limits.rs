//! Size of every kernel map, in one place, with its memory. An entry of a hash map costs about key + value + 64 bytes.

/// Pods on a node (`PODS`, and the slots of `LISTENERS`). The kubelet's default limit is 110.
/// 1,024 × (8 + 72 + 64) B = 144 KiB.
pub const MAX_PODS: u32 = 1024;

/// Addresses of a Pod. Kubernetes gives two (dual stack).
pub const MAX_POD_ADDRESSES: usize = 4;

/// Redirected connections between their connect and the close of the application's socket (`ORIGINAL_DESTINATIONS`).
/// 65,536 × (48 + 32 + 64) B = 9 MiB at most; allocated as used. Full: the connection is refused and counted.
pub const MAX_ORIGINAL_DESTINATIONS: u32 = 65_536;

/// Connections of the agent to applications (`UPSTREAM_CONNECTIONS`), while they live.
/// 65,536 × (40 + 8 + 64) B = 7 MiB at most; allocated as used. Full: the connect is refused and counted.
pub const MAX_UPSTREAM_CONNECTIONS: u32 = 65_536;

/// Entries of `LISTENERS`: 1,024 × 2 × 8 B = 16 KiB.
pub const MAX_LISTENERS: u32 = MAX_PODS * super::LISTENERS_PER_POD;
