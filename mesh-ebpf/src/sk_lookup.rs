//! sk_lookup in a Pod's network namespace: every TCP connection from outside the Pod goes to the agent's listeners, or nowhere.

use core::ptr;

use aya_ebpf::bindings::sk_action::{SK_DROP, SK_PASS};
use aya_ebpf::bindings::{BPF_SK_LOOKUP_F_NO_REUSEPORT, bpf_sk_lookup};
use aya_ebpf::macros::sk_lookup;
use aya_ebpf::programs::SkLookupContext;
use mesh_common::{Counter, LISTENERS_PER_POD, PLAINTEXT_LISTENER, TUNNEL_LISTENER, TUNNEL_PORT, UpstreamConnectionKey};

use crate::address::{AF_INET, Address, IPPROTO_TCP, address_field, field};
use crate::maps::{LISTENERS, UPSTREAM_CONNECTIONS, agent_is_alive, count};
use crate::probes;

/// The Pod's slot: each Pod has an instance of this program, loaded with its own. Never derived from a packet: a Pod may put
/// another Pod's address on an interface of its own.
#[unsafe(no_mangle)]
static SLOT: u32 = u32::MAX;

#[sk_lookup]
pub fn steer(ctx: SkLookupContext) -> u32 {
    let lookup = ctx.lookup;
    if field!(lookup, protocol) != IPPROTO_TCP {
        return SK_PASS;
    }
    let (remote, local) = if field!(lookup, family) == AF_INET {
        (
            Address::from_v4(field!(lookup, remote_ip4)),
            Address::from_v4(field!(lookup, local_ip4)),
        )
    } else {
        (
            address_field!(bpf_sk_lookup, lookup, remote_ip6),
            address_field!(bpf_sk_lookup, lookup, local_ip6),
        )
    };
    // Traffic within the Pod. The interface would not tell: a connection to the Pod's own address shows another one than lo.
    if remote.is_loopback() || local.is_loopback() || remote == local {
        return SK_PASS;
    }
    // SAFETY: a constant of the loaded program; volatile, or the compiler would take the value from here.
    let slot = unsafe { ptr::read_volatile(&raw const SLOT) };
    let local_port = field!(lookup, local_port) as u16;
    let upstream = UpstreamConnectionKey {
        slot,
        client_port: u16::from_be(field!(lookup, remote_port)),
        application_port: local_port,
        client_address: remote.bytes(),
        application_address: local.bytes(),
    };
    if UPSTREAM_CONNECTIONS.get_ptr(&upstream).is_some() {
        count(Counter::PassedUpstream);
        return SK_PASS;
    }
    // Also while no agent lives: a Pod whose probes failed then would be restarted.
    if probes::is_vouched(&upstream) {
        count(Counter::PassedProbe);
        return SK_PASS;
    }
    if !agent_is_alive() {
        count(Counter::DroppedAgentSilent);
        return SK_DROP;
    }
    let (listener, steered) = if local_port == TUNNEL_PORT {
        (TUNNEL_LISTENER, Counter::SteeredTunnel)
    } else {
        (PLAINTEXT_LISTENER, Counter::SteeredPlaintext)
    };
    let index = slot.wrapping_mul(LISTENERS_PER_POD).wrapping_add(listener);
    // Without the flag a reuseport group of the Pod could pick another of its sockets.
    if LISTENERS
        .redirect_sk_lookup(&ctx, index, u64::from(BPF_SK_LOOKUP_F_NO_REUSEPORT))
        .is_err()
    {
        count(Counter::DroppedNoListener);
        return SK_DROP;
    }
    count(steered);
    SK_PASS
}
