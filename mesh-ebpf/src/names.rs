//! cgroup/getpeername4,6 and getsockname4,6: an application whose connect was redirected sees the connection that it asked for.

use core::ffi::c_void;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::helpers::generated::bpf_get_netns_cookie;
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use mesh_common::{SocketDestinationValue, limits};

use crate::address::{Address, address_field, field, set_address_field, set_field};
use crate::maps::{ORIGINAL_DESTINATIONS_OF_SOCKETS, PASS, pod_of};

/// States of a socket that is no connection (include/net/tcp_states.h): what an earlier connect recorded is not shown.
const TCP_CLOSE: u32 = 7;
const TCP_LISTEN: u32 = 10;

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    let addr = ctx.sock_addr;
    if let Some(asked) = asked_for(&ctx) {
        // SAFETY: the address is the first field of a value that the kernel aligns to 8.
        set_field!(addr, unsafe { Address::read(&raw const asked.address) }.0[3], user_ip4);
        set_field!(addr, u32::from(asked.port.to_be()), user_port);
    }
    PASS
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    let addr = ctx.sock_addr;
    if let Some(asked) = asked_for(&ctx) {
        // SAFETY: as in `getpeername4`.
        set_address_field!(addr, unsafe { Address::read(&raw const asked.address) }, user_ip6);
        set_field!(addr, u32::from(asked.port.to_be()), user_port);
    }
    PASS
}

#[cgroup_sock_addr(getsockname4)]
pub fn getsockname4(ctx: SockAddrContext) -> i32 {
    let addr = ctx.sock_addr;
    if let Some(own) = own_address(&ctx, Address::from_v4(field!(addr, user_ip4))) {
        set_field!(addr, own.0[3], user_ip4);
    }
    PASS
}

#[cgroup_sock_addr(getsockname6)]
pub fn getsockname6(ctx: SockAddrContext) -> i32 {
    let addr = ctx.sock_addr;
    if let Some(own) = own_address(&ctx, address_field!(bpf_sock_addr, addr, user_ip6)) {
        set_address_field!(addr, own, user_ip6);
    }
    PASS
}

/// Where the application wanted this connection to go, if it was redirected.
#[inline(always)]
fn asked_for<'a>(ctx: &SockAddrContext) -> Option<&'a SocketDestinationValue> {
    let socket = field!(ctx.sock_addr, __bindgen_anon_1.sk);
    let asked = ORIGINAL_DESTINATIONS_OF_SOCKETS.of(socket.cast::<c_void>())?;
    let state = field!(socket, state);
    if asked.recorded == 0 || state == TCP_CLOSE || state == TCP_LISTEN {
        None
    } else {
        Some(asked)
    }
}

/// The Pod's address of the family that a redirected connection's `local` loopback address stands for.
#[inline(always)]
fn own_address(ctx: &SockAddrContext, local: Address) -> Option<Address> {
    if !local.is_loopback() {
        return None;
    }
    asked_for(ctx)?;
    // SAFETY: the context is this program's.
    let pod = pod_of(unsafe { bpf_get_netns_cookie(ctx.as_ptr()) })?;
    let mut i = 0;
    while i < limits::MAX_POD_ADDRESSES {
        if i < pod.address_count as usize {
            // SAFETY: `addresses` lies 8 bytes into the value, which the kernel aligns to 8.
            let own = unsafe { Address::read(&raw const pod.addresses[i]) };
            if own.is_v4() == local.is_v4() {
                return Some(own);
            }
        }
        i += 1;
    }
    None
}
