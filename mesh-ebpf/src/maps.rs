//! Every map: who writes it, who reads it. All are pinned by name and reused by later loads; sizes are `mesh_common::limits`.

use core::ffi::c_void;
use core::ptr;

use aya_ebpf::bindings::{BPF_F_CLONE, BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE, bpf_map_type};
use aya_ebpf::btf_maps::{self, HashOfMaps};
use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_set_retval, bpf_sk_storage_get};
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, PerCpuArray, SockMap};
use mesh_common::{
    AddressBytes, AgentSocketValue, Counter, HEARTBEAT_LEASE_NS, KubeletSocketValue, KubeletValue, OriginalDestinationValue,
    PodValue, ProbePortKey, RedirectedConnectionKey, SocketDestinationValue, UpstreamConnectionKey, limits,
};

use crate::address::Address;

/// Enrolled Pods by network-namespace cookie. Written by the agent at enrolment and release; read by connect, bind, sockops,
/// getsockname, sock_create and tcx.
#[map]
pub static PODS: HashMap<u64, PodValue> = HashMap::pinned(limits::MAX_PODS, 0);

/// When the agent last beat, CLOCK_MONOTONIC ns. Written by the agent; read by connect and sk_lookup.
#[map]
pub static HEARTBEAT: Array<u64> = Array::pinned(1, 0);

/// The agent's own sockets. Written by the agent, by file descriptor, before `connect` or `bind`; read by connect,
/// bind, sockops and tcx.
#[btf_map]
pub static AGENT_SOCKETS: SocketStorage<AgentSocketValue, { (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize }> = SocketStorage::new();

/// Where an application's socket wanted to go. Written by connect; read by sockops, getpeername and getsockname; gone with its
/// socket.
#[btf_map]
pub static ORIGINAL_DESTINATIONS_OF_SOCKETS: SocketStorage<SocketDestinationValue, { BPF_F_NO_PREALLOC as usize }> =
    SocketStorage::new();

/// The same for the agent, by what it sees when it accepts: a map for each Pod, by network-namespace cookie, so that no Pod can
/// fill another's. Made by the agent at enrolment; entries are written by sockops and taken by the agent.
#[btf_map]
pub static ORIGINAL_DESTINATIONS: HashOfMaps<u64, DestinationsOfPod, { limits::MAX_PODS as usize }> = HashOfMaps::new();

type DestinationsOfPod = btf_maps::HashMap<
    RedirectedConnectionKey,
    OriginalDestinationValue,
    { limits::MAX_ORIGINAL_DESTINATIONS_PER_POD as usize },
    { BPF_F_NO_PREALLOC as usize },
>;

/// The agent's connects to applications on their way, with the time of the connect, ns. Written by sockops; read by sk_lookup.
#[map]
pub static UPSTREAM_CONNECTIONS: HashMap<UpstreamConnectionKey, u64> =
    HashMap::pinned(limits::MAX_UPSTREAM_CONNECTIONS, BPF_F_NO_PREALLOC);

/// Whose connects from the node are probes. Written by the agent; read by connect.
#[map]
pub static KUBELET: Array<KubeletValue> = Array::pinned(1, 0);

/// The kubelet's sockets. Written by connect, at each connect from the node's network namespace; read by sockops.
#[btf_map]
pub static KUBELET_SOCKETS: SocketStorage<KubeletSocketValue, { BPF_F_NO_PREALLOC as usize }> = SocketStorage::new();

/// Where Pods say that the kubelet asks them. Written by the agent; read by sockops.
#[map]
pub static PROBE_PORTS: HashMap<ProbePortKey, u32> = HashMap::pinned(limits::MAX_PROBE_PORTS, BPF_F_NO_PREALLOC);

/// The kubelet's connects to those ports on their way: a map for each Pod, by slot, with the time of the connect, ns. Made by the
/// agent at enrolment; entries are written by sockops and read by sk_lookup.
#[btf_map]
pub static PROBE_VOUCHES: HashOfMaps<u32, VouchesOfPod, { limits::MAX_PODS as usize }> = HashOfMaps::new();

pub type VouchesOfPod =
    btf_maps::HashMap<UpstreamConnectionKey, u64, { limits::MAX_PROBE_VOUCHES_PER_POD as usize }, { BPF_F_NO_PREALLOC as usize }>;

/// The agent's listeners. Written by the agent; read by sk_lookup. A socket that closes leaves the map by itself.
#[map]
pub static LISTENERS: SockMap = SockMap::pinned(limits::MAX_LISTENERS, 0);

/// What is in the mesh, by prefix in normal form: 1, or 0 for what is taken out of a wider one. Written by the agent; read by tcx.
#[map]
pub static MESH_DESTINATIONS: LpmTrie<AddressBytes, u8> = LpmTrie::pinned(limits::MAX_MESH_DESTINATIONS, 0);

/// What happened, per CPU, by [`Counter`]. Written by every program; read by the agent.
#[map]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::pinned(Counter::COUNT, 0);

/// A socket storage of any flags; aya's own has no BPF_F_CLONE. The fields are what the loader reads in the BTF.
#[repr(C)]
pub struct SocketStorage<V, const FLAGS: usize> {
    r#type: *const [i32; bpf_map_type::BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const V,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; FLAGS],
}

// SAFETY: the pointers are only types for the loader and never followed.
unsafe impl<V, const FLAGS: usize> Sync for SocketStorage<V, FLAGS> {}

impl<V, const FLAGS: usize> SocketStorage<V, FLAGS> {
    const fn new() -> Self {
        Self {
            r#type: ptr::null(),
            key: ptr::null(),
            value: ptr::null(),
            max_entries: ptr::null(),
            map_flags: ptr::null(),
        }
    }

    /// The value of a socket, where it has one.
    #[inline(always)]
    pub fn of<'a>(&self, socket: *mut c_void) -> Option<&'a mut V> {
        self.storage(socket, 0)
    }

    /// The value of a socket, made (zeroed) where it has none. `None`: no memory for it.
    #[inline(always)]
    pub fn of_or_new<'a>(&self, socket: *mut c_void) -> Option<&'a mut V> {
        self.storage(socket, u64::from(BPF_SK_STORAGE_GET_F_CREATE))
    }

    #[inline(always)]
    fn storage<'a>(&self, socket: *mut c_void, flags: u64) -> Option<&'a mut V> {
        // SAFETY: the map is `self` and the verifier checks the socket; the value lives until the program ends.
        unsafe {
            bpf_sk_storage_get(ptr::from_ref(self).cast_mut().cast(), socket, ptr::null_mut(), flags)
                .cast::<V>()
                .as_mut()
        }
    }
}

#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the entry is this CPU's own.
        unsafe { *value = (*value).wrapping_add(1) };
    }
}

/// Monotonic time, ns: the clock that the agent beats with.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: the helper takes nothing.
    unsafe { bpf_ktime_get_ns() }
}

/// Whether the agent has beaten within its lease. Never beaten is silence too.
#[inline(always)]
pub fn agent_is_alive() -> bool {
    let Some(beat) = HEARTBEAT.get_ptr(0) else { return false };
    // SAFETY: an aligned u64 of a map; read once, as the agent writes it meanwhile.
    let beat = unsafe { ptr::read_volatile(beat) };
    // A beat may be newer than `now` by a race between CPUs.
    beat != 0 && now_ns().saturating_sub(beat) <= HEARTBEAT_LEASE_NS
}

#[inline(always)]
pub fn pod_of<'a>(netns_cookie: u64) -> Option<&'a PodValue> {
    // SAFETY: preallocated entry; a Pod that is released meanwhile at worst decides one more connect.
    unsafe { PODS.get(&netns_cookie) }
}

/// Whether an address is one of the Pod's own.
#[inline(always)]
pub fn is_own(pod: &PodValue, address: Address) -> bool {
    let mut i = 0;
    while i < limits::MAX_POD_ADDRESSES {
        // SAFETY: `addresses` lies 8 bytes into the value, which the kernel aligns to 8.
        if i < pod.address_count as usize && unsafe { Address::read(&raw const pod.addresses[i]) } == address {
            return true;
        }
        i += 1;
    }
    false
}

/// Whether a destination is the mesh's: the longest prefix that it is in says so.
#[inline(always)]
pub fn is_in_mesh(destination: Address) -> bool {
    let key = Key::new(128, destination.bytes());
    MESH_DESTINATIONS.get(&key).is_some_and(|of_mesh| *of_mesh != 0)
}

/// The connections of a Pod that the agent is to accept. `None`: it is not enrolled.
#[inline(always)]
pub fn destinations_of<'a>(netns_cookie: u64) -> Option<&'a DestinationsOfPod> {
    // SAFETY: the map of a Pod that is released meanwhile lives until this program ends.
    unsafe { ORIGINAL_DESTINATIONS.get(&netns_cookie) }
}

/// The kubelet's connects to a Pod. `None`: nobody is enrolled in that slot.
#[inline(always)]
pub fn vouches_of<'a>(slot: u32) -> Option<&'a VouchesOfPod> {
    // SAFETY: the map of a Pod that is released meanwhile lives until this program ends.
    unsafe { PROBE_VOUCHES.get(&slot) }
}

/// Whether the kernel has `bpf_set_retval` (5.18): set when the program is loaded. Without it a refusal is EPERM.
#[unsafe(no_mangle)]
static HAS_SET_RETVAL: u32 = 1;

/// The result of a cgroup program that refuses, with the error that the caller sees.
#[inline(always)]
pub fn refuse(errno: i32) -> i32 {
    // SAFETY: a constant of the loaded program; volatile, or the compiler would take the value from here. Where it is 0 the
    // verifier drops the call.
    if unsafe { ptr::read_volatile(&raw const HAS_SET_RETVAL) } != 0 {
        // SAFETY: the helper takes a number.
        unsafe { bpf_set_retval(-errno) };
    }
    0
}

/// The result of a cgroup program that lets the call go on.
pub const PASS: i32 = 1;
