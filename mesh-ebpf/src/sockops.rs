//! sockops at a connect (the local port is known, the SYN has not left) and at its end: what the agent's accept and the Pods'
//! sk_lookup find a connection by. The kubelet's connects are in it, too; what is theirs alone is in `probes.rs`.
//!
//! A connect of the agent to an application passes sk_lookup by its tuple, and only until the application's end is established:
//! from then on the kernel finds that end by itself (also after a SYN cookie, where the handshake's last segment is looked up
//! anew). Were the entry to stay, and the application to close first, the true client could use the same tuple past policy.

use core::ffi::c_void;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_ANY, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB,
    BPF_TCP_CLOSE, BPF_TCP_CLOSE_WAIT, BPF_TCP_CLOSING, BPF_TCP_FIN_WAIT1, BPF_TCP_FIN_WAIT2, bpf_sock_ops,
};
use aya_ebpf::helpers::generated::bpf_get_netns_cookie;
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;
use mesh_common::{
    Counter, KubeletSocketValue, OriginalDestinationValue, RedirectedConnectionKey, SocketDestinationValue,
    UpstreamConnectionKey, socket_kind,
};

use crate::address::{AF_INET, AF_INET6, Address, address_field, field};
use crate::maps::{
    AGENT_SOCKETS, KUBELET_SOCKETS, ORIGINAL_DESTINATIONS_OF_SOCKETS, UPSTREAM_CONNECTIONS, count, destinations_of, now_ns,
    pod_of,
};
use crate::probes;

/// What the kernel expects from callbacks without a reply.
const DONE: u32 = 1;

#[sock_ops]
pub fn connection_events(ctx: SockOpsContext) -> u32 {
    let ops = ctx.ops;
    match field!(ops, op) {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(&ctx, ops),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => established(&ctx, ops),
        BPF_SOCK_OPS_STATE_CB => match field!(ops, __bindgen_anon_1.args[1]) {
            BPF_TCP_CLOSE_WAIT => upstream_ended(ops),
            BPF_TCP_CLOSE => {
                upstream_ended(ops);
                redirected_ended(&ctx, ops);
            }
            _ => {}
        },
        _ => {}
    }
    DONE
}

/// A connection that concerns the agent.
enum Connection<'a> {
    /// Of an application, redirected to the agent.
    Redirected(&'a SocketDestinationValue),
    /// Of the agent to the application of the Pod with this slot.
    Upstream(u32),
    /// Of the kubelet, to anywhere.
    Kubelet(&'a mut KubeletSocketValue),
}

#[inline(always)]
fn connecting(ctx: &SockOpsContext, ops: *mut bpf_sock_ops) {
    let Some(ends) = Ends::of(ops) else { return };
    match connection(ops) {
        Some(Connection::Upstream(slot)) => {
            if UPSTREAM_CONNECTIONS
                .insert(ends.upstream_key(slot), now_ns(), u64::from(BPF_ANY))
                .is_err()
            {
                count(Counter::UpstreamsFull);
                return;
            }
        }
        Some(Connection::Redirected(asked)) => {
            // SAFETY: the address is the first field of a value that the kernel aligns to 8.
            let address = unsafe { Address::read(&raw const asked.address) }.bytes();
            let value = OriginalDestinationValue {
                connected_at_ns: now_ns(),
                address,
                port: asked.port,
                _pad: [0; 3],
            };
            let key = ends.redirected_key(ctx);
            let is_recorded =
                destinations_of(key.netns_cookie).is_some_and(|of_pod| of_pod.insert(key, value, u64::from(BPF_ANY)).is_ok());
            if !is_recorded {
                count(Counter::DestinationsFull);
                return;
            }
        }
        Some(Connection::Kubelet(mark)) => {
            mark.is_vouched = 0;
            let Some(slot) = probes::declared(ends.remote, ends.remote_port) else {
                return;
            };
            probes::vouch(mark, &ends.upstream_key(slot));
            // Without word of its end nobody is vouched for.
            if set_state_callback(ctx, ops).is_err() {
                probes::forget(&ends.upstream_key(slot));
                count(Counter::ProbesFull);
            }
            return;
        }
        None => return,
    }
    // Where this fails the entry stays until it is taken, or until the agent sweeps it.
    let _ = set_state_callback(ctx, ops);
}

/// Other programs may have asked for callbacks of their own.
#[inline(always)]
fn set_state_callback(ctx: &SockOpsContext, ops: *mut bpf_sock_ops) -> Result<(), i32> {
    ctx.set_cb_flags((field!(ops, bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_STATE_CB_FLAG) as i32)
}

/// A Pod's socket has accepted a connection: if it was the agent's, or a probe, nothing needs to pass by its tuple any more.
#[inline(always)]
fn established(ctx: &SockOpsContext, ops: *mut bpf_sock_ops) {
    // SAFETY: the context is this program's.
    let Some(pod) = pod_of(unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }) else {
        return;
    };
    let Some(ends) = Ends::of(ops) else { return };
    let key = ends.reversed().upstream_key(pod.slot);
    let _ = UPSTREAM_CONNECTIONS.remove(key);
    probes::forget(&key);
}

/// The agent's end, or the kubelet's, has closed, or learnt that the application has: a connect that failed, or one whose accept was not seen.
#[inline(always)]
fn upstream_ended(ops: *mut bpf_sock_ops) {
    let Some(ends) = Ends::of(ops) else { return };
    match connection(ops) {
        Some(Connection::Upstream(slot)) => {
            let _ = UPSTREAM_CONNECTIONS.remove(ends.upstream_key(slot));
        }
        Some(Connection::Kubelet(mark)) if mark.is_vouched != 0 => {
            mark.is_vouched = 0;
            probes::forget(&ends.upstream_key(mark.slot));
        }
        _ => {}
    }
}

#[inline(always)]
fn redirected_ended(ctx: &SockOpsContext, ops: *mut bpf_sock_ops) {
    // An application that sends and closes at once is done here while its connection still waits in the agent's queue: closed
    // in order, the entry is the agent's to take.
    if let BPF_TCP_FIN_WAIT1 | BPF_TCP_FIN_WAIT2 | BPF_TCP_CLOSING = field!(ops, __bindgen_anon_1.args[0]) {
        return;
    }
    if let Some(Connection::Redirected(_)) = connection(ops)
        && let Some(ends) = Ends::of(ops)
    {
        let key = ends.redirected_key(ctx);
        if let Some(of_pod) = destinations_of(key.netns_cookie) {
            let _ = of_pod.remove(key);
        }
    }
}

/// What this socket's storages say about it.
#[inline(always)]
fn connection<'a>(ops: *mut bpf_sock_ops) -> Option<Connection<'a>> {
    let socket: *mut c_void = field!(ops, __bindgen_anon_2.sk).cast();
    if socket.is_null() {
        return None;
    }
    if let Some(mark) = AGENT_SOCKETS.of(socket) {
        return if mark.kind == socket_kind::INBOUND_UPSTREAM {
            Some(Connection::Upstream(mark.slot))
        } else {
            None
        };
    }
    if let Some(asked) = ORIGINAL_DESTINATIONS_OF_SOCKETS.of(socket) {
        return (asked.recorded != 0).then_some(Connection::Redirected(asked));
    }
    let mark = KUBELET_SOCKETS.of(socket)?;
    (mark.is_kubelets != 0).then_some(Connection::Kubelet(mark))
}

/// Both ends of a connection.
struct Ends {
    local: Address,
    remote: Address,
    local_port: u16,
    remote_port: u16,
}

impl Ends {
    #[inline(always)]
    fn of(ops: *mut bpf_sock_ops) -> Option<Ends> {
        let family = field!(ops, family);
        let local_port = field!(ops, local_port) as u16;
        // Big-endian in 32 bits, unlike the local port.
        let remote_port = u32::from_be(field!(ops, remote_port)) as u16;
        if family == AF_INET6 {
            let remote = address_field!(bpf_sock_ops, ops, remote_ip6);
            if !remote.is_v4() {
                return Some(Ends {
                    local: address_field!(bpf_sock_ops, ops, local_ip6),
                    remote,
                    local_port,
                    remote_port,
                });
            }
            // A v4-mapped connect: its local IPv6 address is filled in only after this callback.
        } else if family != AF_INET {
            return None;
        }
        let local = Address::from_v4(field!(ops, local_ip4));
        Some(Ends {
            local,
            remote: Address::from_v4(field!(ops, remote_ip4)),
            local_port,
            remote_port,
        })
    }

    /// As the other end sees them.
    #[inline(always)]
    fn reversed(self) -> Ends {
        Ends {
            local: self.remote,
            remote: self.local,
            local_port: self.remote_port,
            remote_port: self.local_port,
        }
    }

    #[inline(always)]
    fn redirected_key(&self, ctx: &SockOpsContext) -> RedirectedConnectionKey {
        RedirectedConnectionKey {
            // SAFETY: the context is this program's.
            netns_cookie: unsafe { bpf_get_netns_cookie(ctx.as_ptr()) },
            client_address: self.local.bytes(),
            listener_address: self.remote.bytes(),
            client_port: self.local_port,
            listener_port: self.remote_port,
            _pad: 0,
        }
    }

    #[inline(always)]
    fn upstream_key(&self, slot: u32) -> UpstreamConnectionKey {
        UpstreamConnectionKey {
            slot,
            client_port: self.local_port,
            application_port: self.remote_port,
            client_address: self.local.bytes(),
            application_address: self.remote.bytes(),
        }
    }
}
