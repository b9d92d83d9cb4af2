//! tcx ingress at the node's end of a Pod's veth: every packet that leaves the Pod. A second line behind connect: raw and packet
//! sockets, and addresses bound with IPV6_FREEBIND, pass no socket hook, but nothing leaves without passing here.
//!
//! What is dropped: a source that is not the Pod's, and a SYN to the mesh that no tunnel or pass-through of the agent sent. Which
//! socket sent it the packet itself tells: a veth keeps it (Linux 4.19), and its mark is unforgeable. The socket's own addresses
//! must be the packet's, or a root of the Pod could rewrite a pass-through's.
//!
//! A packet inside another (IPIP, GRE, VXLAN) is not looked at: a node that unpacks what Pods send to it lets forged ones by.

use core::ffi::c_void;
use core::ptr;

use aya_ebpf::bindings::{__sk_buff, bpf_sock};
use aya_ebpf::helpers::generated::{bpf_sk_fullsock, bpf_skb_load_bytes};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use mesh_common::{Counter, PodValue, limits, socket_kind};

use crate::address::{Address, IPPROTO_TCP, address_field, field};
use crate::maps::{AGENT_SOCKETS, count, is_in_mesh, is_own, pod_of};

/// The network namespace's cookie: each Pod has an instance of this program, loaded with its own.
#[unsafe(no_mangle)]
static NETNS_COOKIE: u64 = 0;

/// Let the next program decide (include/uapi/linux/bpf.h).
const TCX_NEXT: i32 = -1;
const TCX_DROP: i32 = 2;

const ETH_P_IP: u32 = 0x0800_u16.to_be() as u32;
const ETH_P_IPV6: u32 = 0x86dd_u16.to_be() as u32;
const ETH_P_8021Q: u32 = 0x8100_u16.to_be() as u32;
const ETH_P_8021AD: u32 = 0x88a8_u16.to_be() as u32;

/// The outer VLAN tag, if there is one, is not in the data any more.
const ETHERNET_HEADER_LEN: u32 = 14;
const IPV6_HEADER_LEN: u32 = 40;
const TCP_HEADER_LEN: u32 = 20;

// IANA protocol numbers. Of the extension headers those that Linux walks on its way to TCP.
const HOP_BY_HOP: u32 = 0;
const ROUTING: u32 = 43;
const FRAGMENT: u32 = 44;
const AUTHENTICATION: u32 = 51;
const DESTINATION_OPTIONS: u32 = 60;

// In the third word of a TCP header after the ports and sequence numbers.
const SYN: u32 = 1 << 17;
const ACK: u32 = 1 << 20;

#[derive(Clone, Copy)]
enum Verdict {
    Next,
    Drop(Counter),
}

/// Where a TCP header begins, and whether the packet's destination is its last one: a source route hides where it goes.
struct Segment {
    offset: u32,
    source: Address,
    destination: Address,
    is_routed: bool,
}

#[classifier]
pub fn backstop(ctx: TcContext) -> i32 {
    // SAFETY: a constant of the loaded program; volatile, or the compiler would take the value from here.
    let Some(pod) = pod_of(unsafe { ptr::read_volatile(&raw const NETNS_COOKIE) }) else {
        return TCX_NEXT;
    };
    let skb = ctx.skb.skb;
    let verdict = match field!(skb, protocol) {
        ETH_P_IP => ipv4(skb, pod),
        ETH_P_IPV6 => ipv6(skb, pod),
        // The kernel has taken the first tag off. A second one is taken off after this hook if the first names no VLAN.
        ETH_P_8021Q | ETH_P_8021AD => Verdict::Drop(Counter::DroppedHiddenHeader),
        _ => Verdict::Next,
    };
    match verdict {
        Verdict::Next => TCX_NEXT,
        Verdict::Drop(counter) => {
            count(counter);
            TCX_DROP
        }
    }
}

#[inline(always)]
fn ipv4(skb: *mut __sk_buff, pod: &PodValue) -> Verdict {
    const HIDDEN: Verdict = Verdict::Drop(Counter::DroppedHiddenHeader);
    const WORDS_WITHOUT_OPTIONS: u32 = 5;
    const MORE_FRAGMENTS: u32 = 0x2000;
    const OFFSET_MASK: u32 = 0x1fff;
    let Some(header) = load::<5>(skb, ETHERNET_HEADER_LEN) else {
        return HIDDEN;
    };
    let source = Address::from_v4(header[3]);
    if !is_own(pod, source) {
        return Verdict::Drop(Counter::DroppedForeignSource);
    }
    if u32::from_be(header[2]) >> 16 & 0xff != IPPROTO_TCP {
        return Verdict::Next;
    }
    let first = u32::from_be(header[0]);
    let (version, words) = (first >> 28, first >> 24 & 0xf);
    if version != 4 || words < WORDS_WITHOUT_OPTIONS {
        return HIDDEN;
    }
    let length = words * 4;
    let fragment = u32::from_be(header[1]);
    let offset = (fragment & OFFSET_MASK) * 8;
    if offset != 0 {
        // RFC 1858: one that lies over the flags may change them; the first one is checked as a whole.
        return if offset < TCP_HEADER_LEN { HIDDEN } else { Verdict::Next };
    }
    // What lies beyond the packet's own length is cut off before the next fragment follows.
    if fragment & MORE_FRAGMENTS != 0 && (first & 0xffff) < length + TCP_HEADER_LEN {
        return HIDDEN;
    }
    segment(
        skb,
        pod,
        &Segment {
            offset: ETHERNET_HEADER_LEN + length,
            source,
            destination: Address::from_v4(header[4]),
            is_routed: words != WORDS_WITHOUT_OPTIONS,
        },
    )
}

#[inline(always)]
fn ipv6(skb: *mut __sk_buff, pod: &PodValue) -> Verdict {
    const HIDDEN: Verdict = Verdict::Drop(Counter::DroppedHiddenHeader);
    const OFFSET_MASK: u32 = 0xfff8;
    const MORE_FRAGMENTS: u32 = 1;
    let Some(header) = load::<10>(skb, ETHERNET_HEADER_LEN) else {
        return HIDDEN;
    };
    let source = Address([header[2], header[3], header[4], header[5]]);
    // Neighbour discovery and multicast listener reports. An IPv4 address has no business in an IPv6 header.
    let is_unspecified = source.0 == [0; 4];
    if !is_unspecified && !source.is_link_local_v6() && (source.is_v4() || !is_own(pod, source)) {
        return Verdict::Drop(Counter::DroppedForeignSource);
    }
    let mut next = u32::from_be(header[1]) >> 8 & 0xff;
    let mut offset = IPV6_HEADER_LEN;
    let mut is_first_fragment = false;
    let mut is_routed = false;
    let mut walked = 0;
    while walked <= limits::MAX_EXTENSION_HEADERS {
        let at = ETHERNET_HEADER_LEN + offset;
        match next {
            IPPROTO_TCP => {
                if is_first_fragment {
                    let end = (u32::from_be(header[1]) >> 16) + IPV6_HEADER_LEN;
                    if end < offset + TCP_HEADER_LEN {
                        return HIDDEN;
                    }
                }
                return segment(
                    skb,
                    pod,
                    &Segment {
                        offset: at,
                        source,
                        destination: Address([header[6], header[7], header[8], header[9]]),
                        is_routed,
                    },
                );
            }
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS | AUTHENTICATION | FRAGMENT => {}
            _ => return Verdict::Next,
        }
        // Every one of them has at least eight bytes.
        let Some(extension) = load::<2>(skb, at) else { return HIDDEN };
        let first = u32::from_be(extension[0]);
        let length = first >> 16 & 0xff;
        match next {
            FRAGMENT => {
                let second = first & 0xffff;
                if second & OFFSET_MASK != 0 {
                    return later_fragment(first >> 24, second & OFFSET_MASK);
                }
                is_first_fragment = second & MORE_FRAGMENTS != 0;
                offset += 8;
            }
            AUTHENTICATION => offset += (length + 2) * 4,
            _ => {
                // Segments left: this destination is not the last.
                is_routed |= next == ROUTING && first & 0xff != 0;
                offset += (length + 1) * 8;
            }
        }
        next = first >> 24;
        walked += 1;
    }
    HIDDEN
}

/// A fragment that is not the first, of what begins with `next`. All headers are in the first one (RFC 7112), which is checked.
#[inline(always)]
fn later_fragment(next: u32, offset: u32) -> Verdict {
    match next {
        IPPROTO_TCP if offset < TCP_HEADER_LEN => Verdict::Drop(Counter::DroppedHiddenHeader),
        HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS | AUTHENTICATION | FRAGMENT => Verdict::Drop(Counter::DroppedHiddenHeader),
        _ => Verdict::Next,
    }
}

#[inline(always)]
fn segment(skb: *mut __sk_buff, pod: &PodValue, segment: &Segment) -> Verdict {
    let Some(header) = load::<5>(skb, segment.offset) else {
        return Verdict::Drop(Counter::DroppedHiddenHeader);
    };
    if u32::from_be(header[3]) & (SYN | ACK) != SYN {
        return Verdict::Next;
    }
    // Link-local destinations are left alone, as at connect.
    if !segment.is_routed && (segment.destination.is_link_local_v6() || !is_in_mesh(segment.destination)) {
        return Verdict::Next;
    }
    if !segment.is_routed && is_agents(skb, pod, segment, header[0]) {
        return Verdict::Next;
    }
    Verdict::Drop(Counter::DroppedForeignSyn)
}

/// Whether a tunnel or a pass-through of the agent for this Pod has sent this very SYN.
#[inline(always)]
fn is_agents(skb: *mut __sk_buff, pod: &PodValue, segment: &Segment, ports: u32) -> bool {
    let socket: *mut bpf_sock = field!(skb, __bindgen_anon_2.sk);
    if socket.is_null() {
        return false;
    }
    // SAFETY: the packet holds its socket; the verifier checks that it is one.
    let socket = unsafe { bpf_sk_fullsock(socket) };
    if socket.is_null() {
        return false;
    }
    let Some(mark) = AGENT_SOCKETS.of(socket.cast::<c_void>()) else {
        return false;
    };
    if mark.kind != socket_kind::OUTBOUND || mark.slot != pod.slot {
        return false;
    }
    let ports = u32::from_be(ports);
    if field!(socket, src_port) != ports >> 16 || u32::from(u16::from_be(field!(socket, dst_port))) != ports & 0xffff {
        return false;
    }
    // The socket of an IPv4 connection may be of either family.
    let (source, destination) = if segment.source.is_v4() {
        (
            Address::from_v4(field!(socket, src_ip4)),
            Address::from_v4(field!(socket, dst_ip4)),
        )
    } else {
        (
            address_field!(bpf_sock, socket, src_ip6),
            address_field!(bpf_sock, socket, dst_ip6),
        )
    };
    source == segment.source && destination == segment.destination
}

/// Words of the packet in network order, also of one whose data is not in one piece.
#[inline(always)]
fn load<const WORDS: usize>(skb: *mut __sk_buff, offset: u32) -> Option<[u32; WORDS]> {
    let mut words = [0_u32; WORDS];
    // SAFETY: the buffer is as long as is said.
    let result = unsafe {
        bpf_skb_load_bytes(
            skb.cast_const().cast(),
            offset,
            words.as_mut_ptr().cast(),
            size_of_val(&words) as u32,
        )
    };
    (result == 0).then_some(words)
}
