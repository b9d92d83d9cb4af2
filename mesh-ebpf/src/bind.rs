//! cgroup/bind4, bind6: the agent's ports in an enrolled Pod are the agent's, also while it is dead. Whoever of the Pod listened
//! there would be handed every connection that is redirected, and would keep the next agent out.

use core::ffi::c_void;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::generated::bpf_get_netns_cookie;
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use mesh_common::{Counter, is_agent_port};

use crate::address::{IPPROTO_TCP, field};
use crate::maps::{AGENT_SOCKETS, PASS, count, pod_of, refuse};

/// What an application expects of a port that another holds.
const EADDRINUSE: i32 = 98;

#[cgroup_sock_addr(bind4)]
pub fn bind4(ctx: SockAddrContext) -> i32 {
    decide(&ctx)
}

#[cgroup_sock_addr(bind6)]
pub fn bind6(ctx: SockAddrContext) -> i32 {
    decide(&ctx)
}

#[inline(always)]
fn decide(ctx: &SockAddrContext) -> i32 {
    let addr = ctx.sock_addr;
    if !is_agent_port(u16::from_be(field!(addr, user_port) as u16)) || field!(addr, protocol) != IPPROTO_TCP {
        return PASS;
    }
    // SAFETY: the context is this program's.
    if pod_of(unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }).is_none() {
        return PASS;
    }
    let socket: *mut c_void = field!(addr, __bindgen_anon_1.sk).cast();
    if AGENT_SOCKETS.of(socket).is_some_and(|mark| mark.kind != 0) {
        return PASS;
    }
    count(Counter::RefusedBind);
    refuse(EADDRINUSE)
}
