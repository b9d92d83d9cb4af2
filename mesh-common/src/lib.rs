//! The ABI between the kernel programs (`mesh-ebpf`) and the agent (`mesh-agent::capture`): map keys, map values, limits and
//! constants. Depends on nothing but `core`, so that both sides compile the very same bytes.
//!
//! One normal form of addresses everywhere: 16 bytes, IPv4 as v4-mapped IPv6. Ports are in host order.
#![cfg_attr(not(test), no_std)]

pub mod limits;

/// Version of what agents of different builds share while one takes over from the other: where links are pinned, and every map
/// that is not in [`MAPS_OF_ABI`]. The entries of most belong to sockets and connections that outlive an agent, and cannot be written
/// anew: those maps' layouts are frozen. Something new about a socket goes into a map of another name. Where this number differs
/// no agent takes over, and the node is cleaned up first.
pub const STORAGE_VERSION: u32 = 4;

/// Version of the maps in [`MAPS_OF_ABI`]. Raise it with any change of them. Each version has its own, beside the other's, filled
/// from them before its programs are attached. For that to work, either way: keys stay, values only grow at the end, an index keeps
/// its meaning, and zeros in place of what another version does not know are right until the agent has written them.
pub const ABI_VERSION: u32 = 5;

/// The maps that each ABI version has for itself, in the folder `abi<ABI_VERSION>` of the pins.
pub const MAPS_OF_ABI: [&str; 3] = ["PODS", "MESH_DESTINATIONS", "COUNTERS"];

/// Ports of the agent's listeners inside each Pod's network namespace.
pub const OUTBOUND_PORT: u16 = 15001;
pub const PLAINTEXT_INBOUND_PORT: u16 = 15006;
pub const TUNNEL_PORT: u16 = 15008;
/// Port on a Pod's address at which the agent of its node proves the inbound capture. Steered to the plaintext listener like
/// any other; never forwarded to the application.
pub const PROBE_PORT: u16 = 15009;

/// Whether a port is the agent's own inside a Pod: an application may neither name it as a destination in the mesh (it would
/// loop) nor bind it.
#[must_use]
pub const fn is_agent_port(port: u16) -> bool {
    matches!(port, OUTBOUND_PORT | PLAINTEXT_INBOUND_PORT | TUNNEL_PORT | PROBE_PORT)
}

/// Longest silence of the agent's heartbeat, ns. The writer beats every [`HEARTBEAT_INTERVAL_MS`]; after this lease connections
/// of enrolled Pods are refused. Generous against a loaded machine.
pub const HEARTBEAT_LEASE_NS: u64 = 5_000_000_000;
pub const HEARTBEAT_INTERVAL_MS: u64 = 500;

/// An address in normal form.
pub type AddressBytes = [u8; 16];

/// Value of map `PODS`, keyed by the u64 network-namespace cookie. New fields only at the end; see [`ABI_VERSION`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct PodValue {
    /// Index of the Pod's listeners; fixed while it is enrolled.
    pub slot: u32,
    /// How many of `addresses` are in use.
    pub address_count: u32,
    pub addresses: [AddressBytes; limits::MAX_POD_ADDRESSES],
}

/// Where an application wanted to go: value of the socket storage `ORIGINAL_DESTINATIONS_OF_SOCKETS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct SocketDestinationValue {
    pub address: AddressBytes,
    pub port: u16,
    /// 0: no destination is recorded (a fresh storage, or a socket that was connected again to an untouched address).
    pub recorded: u16,
}

/// Key of a Pod's map in `ORIGINAL_DESTINATIONS`: a redirected connection as the agent sees it when it accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct RedirectedConnectionKey {
    pub netns_cookie: u64,
    /// The application's end.
    pub client_address: AddressBytes,
    /// The agent's listener.
    pub listener_address: AddressBytes,
    pub client_port: u16,
    pub listener_port: u16,
    pub _pad: u32,
}

/// Value of a Pod's map in `ORIGINAL_DESTINATIONS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct OriginalDestinationValue {
    /// `bpf_ktime_get_ns` of the connect.
    pub connected_at_ns: u64,
    pub address: AddressBytes,
    pub port: u16,
    pub _pad: [u16; 3],
}

/// Key of map `UPSTREAM_CONNECTIONS`: a connect of the agent to the application of a Pod, which the Pod's sk_lookup passes
/// until the application's end is established. Also of a Pod's map in `PROBE_VOUCHES`, for a connect of the kubelet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct UpstreamConnectionKey {
    /// The Pod's slot.
    pub slot: u32,
    pub client_port: u16,
    pub application_port: u16,
    pub client_address: AddressBytes,
    pub application_address: AddressBytes,
}

/// Value of map `KUBELET`: whose connects from the node are probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct KubeletValue {
    /// The node's own network namespace.
    pub netns_cookie: u64,
    /// Of the kubelet's processes alone; 0, which no cgroup has: nobody's are.
    pub cgroup_id: u64,
}

/// Key of map `PROBE_PORTS`: where a Pod says that the kubelet asks it. The value is the Pod's slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(C)]
pub struct ProbePortKey {
    pub address: AddressBytes,
    pub port: u16,
    pub _pad: u16,
}

/// Value of the socket storage `KUBELET_SOCKETS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct KubeletSocketValue {
    /// 1: its last connect was the kubelet's.
    pub is_kubelets: u32,
    /// 1: there is a vouch for it in the map of the Pod with this slot.
    pub is_vouched: u32,
    pub slot: u32,
}

/// A vouch that is older counts no longer, ns, should its socket's end have been missed: longer than a kernel waits for the answer to
/// a SYN that it has sent five times.
pub const PROBE_VOUCH_NS: u64 = 60_000_000_000;

/// Why a socket is the agent's: value of the socket storage `AGENT_SOCKETS`, set by file descriptor. 0 is no mark.
pub mod socket_kind {
    /// A tunnel or a pass-through: connect hooks leave it alone; a destination Pod steers it like anyone's.
    pub const OUTBOUND: u32 = 1;
    /// Towards the application of the Pod whose slot is in the mark: passed by that Pod's sk_lookup, while it connects.
    pub const INBOUND_UPSTREAM: u32 = 2;
    /// A listener; accepted sockets inherit it (BPF_F_CLONE).
    pub const LISTENER: u32 = 3;
}

/// Value of `AGENT_SOCKETS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct AgentSocketValue {
    /// One of [`socket_kind`].
    pub kind: u32,
    /// The Pod's slot.
    pub slot: u32,
}

/// The agent's listeners of a Pod in map `LISTENERS`: index = slot × [`LISTENERS_PER_POD`] + one of these.
pub const LISTENERS_PER_POD: u32 = 2;
pub const TUNNEL_LISTENER: u32 = 0;
pub const PLAINTEXT_LISTENER: u32 = 1;

/// What the programs count, per CPU: index of map `COUNTERS`. New ones only at the end; see [`ABI_VERSION`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Counter {
    /// Connects of enrolled Pods redirected to the agent.
    Redirected = 0,
    /// Connects refused because the heartbeat's lease was over.
    RefusedAgentSilent = 1,
    /// Connects refused because the application named a port of the agent.
    RefusedAgentPort = 2,
    /// Connects refused because socket storage could not be had.
    RefusedNoStorage = 3,
    /// MPTCP sockets refused.
    RefusedMptcp = 4,
    /// Connects to link-local addresses, left alone.
    LinkLocalLeftAlone = 5,
    /// Original destinations that did not fit into their Pod's full map; the agent refuses those connections.
    DestinationsFull = 6,
    /// Connects of the agent to applications that did not fit into their full map: steered back to the agent.
    UpstreamsFull = 7,
    /// Inbound SYNs steered to the tunnel listener.
    SteeredTunnel = 8,
    /// Inbound SYNs steered to the plaintext listener.
    SteeredPlaintext = 9,
    /// Inbound SYNs of the agent's own upstream connects, passed to the application.
    PassedUpstream = 10,
    /// Inbound SYNs dropped: no live listener.
    DroppedNoListener = 11,
    /// Inbound SYNs dropped: the heartbeat's lease was over.
    DroppedAgentSilent = 12,
    /// Connects refused because their socket is bound to an interface, from which the agent in the Pod cannot be reached.
    RefusedBoundDevice = 13,
    /// Binds of an application to a port of the agent, refused.
    RefusedBind = 14,
    /// Connects refused because the agent does not listen in the Pod, or somebody else does at its port.
    RefusedNoListener = 15,
    /// Packets that left a Pod with a source address that is not its own, dropped.
    DroppedForeignSource = 16,
    /// SYNs to the mesh that left a Pod and were not the agent's, dropped.
    DroppedForeignSyn = 17,
    /// Packets that left a Pod and could be TCP whose header cannot be seen, dropped: truncated, in overlapping fragments, behind
    /// too many extension headers, or behind a second VLAN tag.
    DroppedHiddenHeader = 18,
    /// SYNs of the kubelet to a declared probe port, passed to the application.
    PassedProbe = 19,
    /// Connects of the kubelet to a declared probe port that could not be vouched for: their Pod's map is full, or there is no memory
    /// for the socket's storage. They are taken for anybody's plaintext.
    ProbesFull = 20,
    /// SYNs whose vouch was too old, steered like anybody's.
    ProbeExpired = 21,
}

impl Counter {
    pub const ALL: [(Counter, &'static str); 22] = [
        (Counter::Redirected, "redirected"),
        (Counter::RefusedAgentSilent, "refused_agent_silent"),
        (Counter::RefusedAgentPort, "refused_agent_port"),
        (Counter::RefusedNoStorage, "refused_no_storage"),
        (Counter::RefusedMptcp, "refused_mptcp"),
        (Counter::LinkLocalLeftAlone, "link_local_left_alone"),
        (Counter::DestinationsFull, "destinations_full"),
        (Counter::UpstreamsFull, "upstreams_full"),
        (Counter::SteeredTunnel, "steered_tunnel"),
        (Counter::SteeredPlaintext, "steered_plaintext"),
        (Counter::PassedUpstream, "passed_upstream"),
        (Counter::DroppedNoListener, "dropped_no_listener"),
        (Counter::DroppedAgentSilent, "dropped_agent_silent"),
        (Counter::RefusedBoundDevice, "refused_bound_device"),
        (Counter::RefusedBind, "refused_bind"),
        (Counter::RefusedNoListener, "refused_no_listener"),
        (Counter::DroppedForeignSource, "dropped_foreign_source"),
        (Counter::DroppedForeignSyn, "dropped_foreign_syn"),
        (Counter::DroppedHiddenHeader, "dropped_hidden_header"),
        (Counter::PassedProbe, "passed_probe"),
        (Counter::ProbesFull, "probes_full"),
        (Counter::ProbeExpired, "probe_expired"),
    ];
    pub const COUNT: u32 = Self::ALL.len() as u32;
}

const _: () = {
    use core::mem::{offset_of, size_of};
    assert!(size_of::<PodValue>() == 8 + 16 * limits::MAX_POD_ADDRESSES);
    assert!(offset_of!(PodValue, slot) == 0);
    assert!(offset_of!(PodValue, address_count) == 4);
    assert!(offset_of!(PodValue, addresses) == 8);
    assert!(size_of::<SocketDestinationValue>() == 20);
    assert!(offset_of!(SocketDestinationValue, port) == 16);
    assert!(size_of::<RedirectedConnectionKey>() == 48);
    assert!(offset_of!(RedirectedConnectionKey, client_address) == 8);
    assert!(offset_of!(RedirectedConnectionKey, listener_address) == 24);
    assert!(offset_of!(RedirectedConnectionKey, client_port) == 40);
    assert!(size_of::<OriginalDestinationValue>() == 32);
    assert!(offset_of!(OriginalDestinationValue, address) == 8);
    assert!(offset_of!(OriginalDestinationValue, port) == 24);
    assert!(size_of::<UpstreamConnectionKey>() == 40);
    assert!(offset_of!(UpstreamConnectionKey, client_address) == 8);
    assert!(offset_of!(UpstreamConnectionKey, application_address) == 24);
    assert!(size_of::<AgentSocketValue>() == 8);
    assert!(size_of::<KubeletValue>() == 16);
    assert!(size_of::<ProbePortKey>() == 20);
    assert!(offset_of!(ProbePortKey, port) == 16);
    assert!(size_of::<KubeletSocketValue>() == 12);
    // The counters' indices and their names go together.
    let mut i = 0;
    while i < Counter::ALL.len() {
        assert!(Counter::ALL[i].0 as usize == i);
        i += 1;
    }
};

#[cfg(feature = "user")]
#[allow(
    unsafe_code,
    reason = "the marker trait that lets aya copy the bytes of these types to and from the kernel"
)]
mod pod {
    // SAFETY: every type is repr(C), made of integers only, and without implicit padding (asserted above).
    unsafe impl aya::Pod for super::PodValue {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::SocketDestinationValue {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::RedirectedConnectionKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::OriginalDestinationValue {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::UpstreamConnectionKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::AgentSocketValue {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::KubeletValue {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::ProbePortKey {}
}
