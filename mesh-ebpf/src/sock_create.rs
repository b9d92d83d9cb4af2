//! cgroup/sock_create: no MPTCP in an enrolled Pod. Its subflows' connects come from sockets that carry another cookie, so the
//! connect hooks would miss them; applications that ask for it fall back to TCP.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::generated::bpf_get_netns_cookie;
use aya_ebpf::macros::cgroup_sock;
use aya_ebpf::programs::SockContext;
use mesh_common::Counter;

use crate::address::field;
use crate::maps::{PASS, count, pod_of, refuse};

const IPPROTO_MPTCP: u32 = 262;
const EPROTONOSUPPORT: i32 = 93;

#[cgroup_sock(sock_create)]
pub fn socket_create(ctx: SockContext) -> i32 {
    if field!(ctx.sock, protocol) != IPPROTO_MPTCP {
        return PASS;
    }
    // SAFETY: the context is this program's.
    if pod_of(unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }).is_none() {
        return PASS;
    }
    count(Counter::RefusedMptcp);
    refuse(EPROTONOSUPPORT)
}
