//! cgroup/connect4, connect6: a TCP connect of an enrolled Pod goes to the agent's listener in that Pod, or is refused.

use core::ffi::c_void;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    bpf_sock, bpf_sock_addr, bpf_sock_tuple__bindgen_ty_1, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1,
    bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2,
};
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_sk_lookup_tcp, bpf_sk_release};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use mesh_common::{Counter, OUTBOUND_PORT, PodValue, SocketDestinationValue, is_agent_port, socket_kind};

use crate::address::{Address, IPPROTO_TCP, address_field, field, set_address_field, set_field};
use crate::maps::{AGENT_SOCKETS, ORIGINAL_DESTINATIONS_OF_SOCKETS, PASS, agent_is_alive, count, is_own, pod_of, refuse};
use crate::probes;

const ECONNREFUSED: i32 = 111;

/// The index of `lo` in every network namespace (LOOPBACK_IFINDEX, include/net/flow.h).
const LOOPBACK_INTERFACE: u32 = 1;

/// Of the context's socket (BPF_F_CURRENT_NETNS).
const CURRENT_NETNS: u64 = u64::MAX;

/// 127.0.0.1, network order.
const LOOPBACK_V4: u32 = 0x7f00_0001_u32.to_be();

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    let addr = ctx.sock_addr;
    let destination = Address::from_v4(field!(addr, user_ip4));
    match decide(&ctx, destination) {
        Decision::LeaveAlone => PASS,
        Decision::Refuse => refuse(ECONNREFUSED),
        Decision::Redirect => {
            set_field!(addr, LOOPBACK_V4, user_ip4);
            set_port(addr);
            PASS
        }
    }
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    let addr = ctx.sock_addr;
    let destination = address_field!(bpf_sock_addr, addr, user_ip6);
    match decide(&ctx, destination) {
        Decision::LeaveAlone => PASS,
        Decision::Refuse => refuse(ECONNREFUSED),
        Decision::Redirect => {
            // A v4-mapped destination must stay IPv4: the socket may be bound to a v4-mapped address.
            let listener = if destination.is_v4() {
                Address::from_v4(LOOPBACK_V4)
            } else {
                Address::LOOPBACK_V6
            };
            set_address_field!(addr, listener, user_ip6);
            set_port(addr);
            PASS
        }
    }
}

#[derive(Clone, Copy)]
enum Decision {
    LeaveAlone,
    Refuse,
    Redirect,
}

/// How a connect to a mesh destination travels.
enum Route {
    Agent,
}

/// The seam for the verdict map: by source identity, destination and port a connect will also be denied here at once, or go
/// straight to a Pod of the same node. A routing hint only; the destination enforces.
#[inline(always)]
fn verdict(_pod: &PodValue, _destination: Address, _port: u16) -> Route {
    Route::Agent
}

#[inline(always)]
fn decide(ctx: &SockAddrContext, destination: Address) -> Decision {
    let addr = ctx.sock_addr;
    if field!(addr, protocol) != IPPROTO_TCP {
        return Decision::LeaveAlone;
    }
    // SAFETY: the context is this program's.
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let socket: *mut c_void = field!(addr, __bindgen_anon_1.sk).cast();
    let Some(pod) = pod_of(netns_cookie) else {
        probes::note_caller(socket, netns_cookie);
        return Decision::LeaveAlone;
    };
    if AGENT_SOCKETS.of(socket).is_some_and(|mark| mark.kind != 0) {
        return Decision::LeaveAlone;
    }
    // A socket may connect again: what an earlier connect recorded must not speak for this one.
    if let Some(recorded) = ORIGINAL_DESTINATIONS_OF_SOCKETS.of(socket) {
        recorded.recorded = 0;
    }

    let port = u16::from_be(field!(addr, user_port) as u16);
    if is_agent_port(port) {
        count(Counter::RefusedAgentPort);
        return Decision::Refuse;
    }
    if destination.is_loopback() || destination.is_unspecified() || is_own(pod, destination) {
        return Decision::LeaveAlone;
    }
    if destination.is_link_local_v6() {
        count(Counter::LinkLocalLeftAlone);
        return Decision::LeaveAlone;
    }
    if !agent_is_alive() {
        count(Counter::RefusedAgentSilent);
        return Decision::Refuse;
    }
    match verdict(pod, destination, port) {
        Route::Agent => {}
    }
    // Bound to another interface, its SYNs to the agent are never answered: it would only hold its entry.
    let bound: *mut bpf_sock = socket.cast();
    let interface = field!(bound, bound_dev_if);
    if interface != 0 && interface != LOOPBACK_INTERFACE {
        count(Counter::RefusedBoundDevice);
        return Decision::Refuse;
    }
    if !agent_listens(ctx, destination.is_v4()) {
        count(Counter::RefusedNoListener);
        return Decision::Refuse;
    }
    let Some(recorded) = ORIGINAL_DESTINATIONS_OF_SOCKETS.of_or_new(socket) else {
        count(Counter::RefusedNoStorage);
        return Decision::Refuse;
    };
    *recorded = SocketDestinationValue {
        address: destination.bytes(),
        port,
        recorded: 1,
    };
    count(Counter::Redirected);
    Decision::Redirect
}

/// Whether it is the agent that gets what is redirected. Its ports cannot be bound by others while the Pod is enrolled; a socket
/// that was bound before may listen once the agent is dead, and one that is bound to an interface is not found here: then nobody
/// is, and the connect is refused, too.
#[inline(always)]
fn agent_listens(ctx: &SockAddrContext, is_v4: bool) -> bool {
    let port = OUTBOUND_PORT.to_be();
    let (mut tuple, size) = if is_v4 {
        let ipv4 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 {
            saddr: LOOPBACK_V4,
            daddr: LOOPBACK_V4,
            sport: 0,
            dport: port,
        };
        (bpf_sock_tuple__bindgen_ty_1 { ipv4 }, size_of_val(&ipv4))
    } else {
        let ipv6 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 {
            saddr: Address::LOOPBACK_V6.0,
            daddr: Address::LOOPBACK_V6.0,
            sport: 0,
            dport: port,
        };
        (bpf_sock_tuple__bindgen_ty_1 { ipv6 }, size_of_val(&ipv6))
    };
    // SAFETY: the tuple is as long as is said, by its family.
    let found = unsafe { bpf_sk_lookup_tcp(ctx.as_ptr(), (&raw mut tuple).cast(), size as u32, CURRENT_NETNS, 0) };
    if found.is_null() {
        return false;
    }
    let is_agents = AGENT_SOCKETS
        .of(found.cast())
        .is_some_and(|mark| mark.kind == socket_kind::LISTENER);
    // SAFETY: found above, released once.
    unsafe { bpf_sk_release(found.cast()) };
    is_agents
}

#[inline(always)]
fn set_port(addr: *mut bpf_sock_addr) {
    set_field!(addr, u32::from(OUTBOUND_PORT.to_be()), user_port);
}
