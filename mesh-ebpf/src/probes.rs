//! The kubelet's probes of Pods in the mesh. Who connects is known at connect, where the caller is the current process; whether to a
//! port that the Pod has declared, at sockops, where no other program can change the destination any more. What is both gets a vouch,
//! by which the Pod's sk_lookup passes that very connection to the application, while it is on its way. A vouch says no more than
//! "kubelet of this node": it has no identity, and no policy is asked.

use core::ffi::c_void;
use core::ptr;

use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::helpers::generated::bpf_get_current_cgroup_id;
use mesh_common::{Counter, KubeletSocketValue, PROBE_VOUCH_NS, ProbePortKey, UpstreamConnectionKey};

use crate::address::Address;
use crate::maps::{KUBELET, KUBELET_SOCKETS, PROBE_PORTS, count, now_ns, vouches_of};

/// A connect from a network namespace that is no Pod's of the mesh. At each: what an earlier connect of the socket was does not speak
/// for this one.
#[inline(always)]
pub fn note_caller(socket: *mut c_void, netns_cookie: u64) {
    let Some(kubelet) = KUBELET.get_ptr(0) else { return };
    // SAFETY: aligned words of a map; the agent may write them meanwhile, each at once.
    let (of_node, cgroup_id) = unsafe {
        (
            ptr::read_volatile(&raw const (*kubelet).netns_cookie),
            ptr::read_volatile(&raw const (*kubelet).cgroup_id),
        )
    };
    if netns_cookie != of_node {
        return;
    }
    // SAFETY: the helper takes nothing.
    let is_kubelets = unsafe { bpf_get_current_cgroup_id() } == cgroup_id;
    if !is_kubelets {
        if let Some(mark) = KUBELET_SOCKETS.of(socket) {
            mark.is_kubelets = 0;
        }
        return;
    }
    match KUBELET_SOCKETS.of_or_new(socket) {
        Some(mark) => mark.is_kubelets = 1,
        None => count(Counter::ProbesFull),
    }
}

/// The slot of the Pod that has declared this port, for a connect of the kubelet's.
#[inline(always)]
pub fn declared(address: Address, port: u16) -> Option<u32> {
    let key = ProbePortKey {
        address: address.bytes(),
        port,
        _pad: 0,
    };
    // SAFETY: a word that is written at once.
    unsafe { PROBE_PORTS.get(&key) }.copied()
}

#[inline(always)]
pub fn vouch(mark: &mut KubeletSocketValue, key: &UpstreamConnectionKey) {
    let is_written = vouches_of(key.slot).is_some_and(|of_pod| of_pod.insert(key, now_ns(), u64::from(BPF_ANY)).is_ok());
    if is_written {
        mark.slot = key.slot;
        mark.is_vouched = 1;
    } else {
        count(Counter::ProbesFull);
    }
}

/// Its connection is established at the Pod's end, or over.
#[inline(always)]
pub fn forget(key: &UpstreamConnectionKey) {
    if let Some(of_pod) = vouches_of(key.slot) {
        let _ = of_pod.remove(key);
    }
}

/// At a Pod's sk_lookup.
#[inline(always)]
pub fn is_vouched(key: &UpstreamConnectionKey) -> bool {
    let Some(of_pod) = vouches_of(key.slot) else { return false };
    // SAFETY: a word that is written at once.
    let Some(connected_at_ns) = (unsafe { of_pod.get(key) }) else {
        return false;
    };
    if now_ns().saturating_sub(*connected_at_ns) > PROBE_VOUCH_NS {
        count(Counter::ProbeExpired);
        return false;
    }
    true
}
