//! The kernel programs and what stands behind them, tried by unprivileged processes in a Pod of the hook tests and, where the
//! kernel is not asked, by peers on loopback.

use super::{Edit, Group, Mutant, Noticed, Suite};

const CONNECT: &str = "mesh-ebpf/src/connect.rs";
const TCX: &str = "mesh-ebpf/src/tcx.rs";
const REVIEWS: &str = "mesh-control/src/kubernetes/reviews.rs";
const PROBES: &str = "mesh-ebpf/src/probes.rs";
const LOOKUP: &str = "mesh-ebpf/src/sk_lookup.rs";
const CONTROL: (Suite, &str) = (Suite::Hooks, "link_local_is_left_alone_and_counted");

const fn hooks(test: &'static str, says: &'static str) -> Noticed {
    Noticed {
        suite: Suite::Hooks,
        test,
        says,
    }
}

const fn agent(test: &'static str, says: &'static str) -> Noticed {
    Noticed {
        suite: Suite::Agent,
        test,
        says,
    }
}

const fn control(test: &'static str, says: &'static str) -> Noticed {
    Noticed {
        suite: Suite::Control,
        test,
        says,
    }
}

pub const CAPTURE: Group = Group {
    name: "capture",
    mutants: &[
        Mutant {
            name: "multipath",
            attacks: &["MPTCP"],
            without: "the refusal of multipath sockets",
            edits: &[Edit {
                file: "mesh-ebpf/src/sock_create.rs",
                from: "protocol) != IPPROTO_MPTCP",
                to: "protocol) != IPPROTO_MPTCP + 1",
            }],
            noticed_by: &[hooks(
                "attacks::multipath_tcp_does_not_get_past",
                "multipath TCP to 10.99.0.1: past the agent",
            )],
        },
        Mutant {
            name: "v4-mapped",
            attacks: &["v4-mapped addresses"],
            without: "the redirect of IPv4 destinations of IPv6 sockets",
            edits: &[Edit {
                file: CONNECT,
                from: "    match decide(&ctx, destination) {\n        Decision::LeaveAlone => PASS,\n        Decision::Refuse => refuse(ECONNREFUSED),\n        Decision::Redirect => {\n            // A v4",
                to: "    match if destination.is_v4() { Decision::LeaveAlone } else { decide(&ctx, destination) } {\n        Decision::LeaveAlone => PASS,\n        Decision::Refuse => refuse(ECONNREFUSED),\n        Decision::Redirect => {\n            // A v4",
            }],
            noticed_by: &[hooks(
                "attacks::a_plain_connect_in_every_form_of_address",
                "connect to ::ffff:10.99.0.1: past the agent",
            )],
        },
        Mutant {
            name: "reconnect",
            attacks: &["AF_UNSPEC reconnect"],
            without: "forgetting where a socket was connected before",
            edits: &[Edit {
                file: CONNECT,
                from: "        recorded.recorded = 0;",
                to: "        let _ = recorded;",
            }],
            noticed_by: &[hooks(
                "applications::a_socket_that_is_disconnected_goes_where_it_is_sent_next",
                "left: \"203.0.113.9 81 from 10.99.0.2\"",
            )],
        },
        Mutant {
            name: "reconnect-once-seen",
            attacks: &["AF_UNSPEC reconnect"],
            without: "looking at a socket that was connected before",
            edits: &[Edit {
                file: CONNECT,
                from: "    if destination.is_loopback() || destination.is_unspecified() || is_own(pod, destination) {",
                to: "    let bound: *mut bpf_sock = socket.cast();\n    if destination.is_loopback() || destination.is_unspecified() || is_own(pod, destination) || field!(bound, src_port) != 0 {",
            }],
            noticed_by: &[hooks(
                "attacks::a_socket_that_was_let_go_once_is_taken_the_next_time",
                "after AF_UNSPEC to ::ffff:10.99.0.1: past the agent",
            )],
        },
        Mutant {
            name: "mark",
            attacks: &["SO_MARK"],
            without: "a mark that only the agent can set: the firewall mark is believed",
            edits: &[Edit {
                file: CONNECT,
                from: "    if AGENT_SOCKETS.of(socket).is_some_and(|mark| mark.kind != 0) {",
                to: "    if AGENT_SOCKETS.of(socket).is_some_and(|mark| mark.kind != 0) || field!(socket.cast::<bpf_sock>(), mark) == 0x4356 {",
            }],
            noticed_by: &[hooks(
                "attacks::a_firewall_mark_does_not_get_past",
                "SO_MARK to 10.99.0.1: past the agent",
            )],
        },
        Mutant {
            name: "bound-device",
            attacks: &["SO_BINDTODEVICE"],
            without: "the refusal of sockets bound to another interface, which hold their entry in vain",
            edits: &[Edit {
                file: CONNECT,
                from: "interface != 0 && interface != LOOPBACK_INTERFACE",
                to: "interface != 0 && interface != LOOPBACK_INTERFACE && interface == 0",
            }],
            noticed_by: &[hooks(
                "bounds::a_socket_bound_to_another_interface_is_refused_and_holds_nothing",
                "left: \"EHOSTUNREACH\"",
            )],
        },
        Mutant {
            name: "impostor",
            attacks: &["SO_BINDTODEVICE", "a direct connection to an agent port"],
            without: "the look whether it is the agent that listens",
            edits: &[Edit {
                file: CONNECT,
                from: "if !agent_listens(ctx, destination.is_v4()) {",
                to: "if !agent_listens(ctx, destination.is_v4()) && !agent_is_alive() {",
            }],
            noticed_by: &[hooks(
                "ports::nobody_but_the_agent_gets_what_is_redirected",
                "left: \"203.0.113.9 80 from 10.99.0.2\"",
            )],
        },
        Mutant {
            name: "older-socket",
            attacks: &["a socket older than the enrolment"],
            without: "taking the socket as it is at connect: only those made after the enrolment are known",
            edits: &[
                Edit {
                    file: "mesh-ebpf/src/sock_create.rs",
                    from: "pub fn socket_create(ctx: SockContext) -> i32 {",
                    to: "pub fn socket_create(ctx: SockContext) -> i32 {\n    if pod_of(unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }).is_some() {\n        let _ = crate::maps::ORIGINAL_DESTINATIONS_OF_SOCKETS.of_or_new(ctx.sock.cast());\n    }",
                },
                Edit {
                    file: CONNECT,
                    from: "    let Some(recorded) = ORIGINAL_DESTINATIONS_OF_SOCKETS.of_or_new(socket) else {\n        count(Counter::RefusedNoStorage);\n        return Decision::Refuse;",
                    to: "    let Some(recorded) = ORIGINAL_DESTINATIONS_OF_SOCKETS.of(socket) else {\n        return Decision::LeaveAlone;",
                },
            ],
            noticed_by: &[hooks(
                "attacks::a_socket_older_than_the_enrolment_does_not_get_past",
                "a socket older than the enrolment to 10.99.0.1: past the agent",
            )],
        },
        Mutant {
            name: "cgroup",
            attacks: &["moving between cgroups"],
            without: "attaching at the root of all cgroups: at the Pod's own instead",
            edits: &[Edit {
                file: "mesh-agent/src/capture/kernel.rs",
                from: "            None => detect_cgroup_root()?,",
                to: "            None => detect_cgroup_root()?.join(config.pin_path.parent().and_then(Path::file_name).unwrap_or_default()),",
            }],
            noticed_by: &[hooks(
                "attacks::moving_to_another_cgroup_does_not_get_past",
                "from another cgroup to 10.99.0.1: past the agent",
            )],
        },
        Mutant {
            name: "bind",
            attacks: &["a direct connection to an agent port"],
            without: "the refusal to bind the agent's ports",
            edits: &[Edit {
                file: "mesh-ebpf/src/bind.rs",
                from: "AGENT_SOCKETS.of(socket).is_some_and(|mark| mark.kind != 0)",
                to: "AGENT_SOCKETS.of(socket).is_none_or(|mark| mark.kind != 0)",
            }],
            noticed_by: &[hooks(
                "ports::an_application_cannot_have_a_port_of_the_agent",
                "left: \"listens\"",
            )],
        },
        Mutant {
            name: "agent-ports",
            attacks: &["a direct connection to an agent port"],
            without: "the refusal to connect to an agent's port",
            edits: &[Edit {
                file: CONNECT,
                from: "    if is_agent_port(port) {",
                to: "    if is_agent_port(port) && port == 0 {",
            }],
            noticed_by: &[hooks(
                "the_ports_of_the_agent_are_refused_everywhere",
                "left: \"127.0.0.1 15001 from 127.0.0.1\"",
            )],
        },
        Mutant {
            name: "slot",
            attacks: &["another Pod's address on loopback"],
            without: "a slot that is the program's own: by the destination address instead",
            edits: &[Edit {
                file: LOOKUP,
                from: "ptr::read_volatile(&raw const SLOT) };",
                to: "ptr::read_volatile(&raw const SLOT) }.wrapping_sub(2).wrapping_add(u32::from_be(local.0[3]) & 0xff);",
            }],
            noticed_by: &[hooks(
                "disguises::another_pods_address_on_lo_does_not_make_it_that_pod",
                "the other Pod's listener was handed it",
            )],
        },
        Mutant {
            name: "reuseport",
            attacks: &["a reuseport group"],
            without: "the flag against reuseport groups",
            edits: &[Edit {
                file: LOOKUP,
                from: "index, u64::from(BPF_SK_LOOKUP_F_NO_REUSEPORT))",
                to: "index, u64::from(BPF_SK_LOOKUP_F_NO_REUSEPORT) & 0)",
            }],
            noticed_by: &[hooks(
                "disguises::a_reuseport_group_of_the_pod_gets_nothing_of_what_is_steered",
                "other sockets of the group were handed connections",
            )],
        },
        Mutant {
            name: "upstream-tuple",
            attacks: &["SO_MARK"],
            without: "the register of the agent's own connects: its ports are believed",
            edits: &[Edit {
                file: LOOKUP,
                from: "UPSTREAM_CONNECTIONS.get_ptr(&upstream).is_some()",
                to: "UPSTREAM_CONNECTIONS.get_ptr(&upstream).is_some() || upstream.client_port == 20_001",
            }],
            noticed_by: &[hooks(
                "disguises::a_firewall_mark_does_not_lead_to_the_application",
                "the application was reached past its agent",
            )],
        },
        Mutant {
            name: "plaintext-deny",
            attacks: &["plaintext past one's own capture"],
            without: "asking DENY about who has the source's address",
            edits: &[Edit {
                file: "mesh-agent/src/proxy/authorize.rs",
                from: "        claimed: claimed.as_ref().map(|workload| &workload.identity),",
                to: "        claimed: claimed.as_ref().filter(|_| false).map(|workload| &workload.identity),",
            }],
            noticed_by: &[agent(
                "proxy::tests::refuse::whom_deny_names_does_not_come_in_without_its_tunnel",
                "the application answered whom DENY names",
            )],
        },
        Mutant {
            name: "agent-port-destination",
            attacks: &["an agent's port as mesh destination"],
            without: "the source's refusal of an agent's port as destination",
            edits: &[Edit {
                file: "mesh-agent/src/proxy/outbound.rs",
                from: "            if mesh_common::is_agent_port(destination.port()) {",
                to: "            if mesh_common::is_agent_port(destination.port()) && destination.port() == 0 {",
            }],
            noticed_by: &[agent(
                "proxy::tests::refuse::what_the_source_refuses",
                "the source let it go on",
            )],
        },
        Mutant {
            name: "foreign-source",
            attacks: &["raw and packet sockets", "IPV6_FREEBIND"],
            without: "the look at a packet's source",
            edits: &[
                Edit {
                    file: TCX,
                    from: "    if !is_own(pod, source) {",
                    to: "    if !is_own(pod, source) && pod.address_count == 0 {",
                },
                Edit {
                    file: TCX,
                    from: "(source.is_v4() || !is_own(pod, source)) {",
                    to: "(source.is_v4() || !is_own(pod, source)) && pod.address_count == 0 {",
                },
            ],
            noticed_by: &[
                hooks("backstop::a_foreign_source_is_dropped", "to=OUT_V4)]): attached: true"),
                hooks(
                    "attacks::a_freely_bound_address_does_not_leave_the_pod",
                    "a datagram from an address that is not the Pod's",
                ),
            ],
        },
        Mutant {
            name: "foreign-syn",
            attacks: &["raw and packet sockets"],
            without: "the drop of a SYN to the mesh that the agent did not send",
            edits: &[Edit {
                file: TCX,
                from: "    Verdict::Drop(Counter::DroppedForeignSyn)\n",
                to: "    Verdict::Next\n",
            }],
            noticed_by: &[hooks(
                "backstop::a_syn_from_a_raw_or_a_packet_socket_is_dropped",
                "send_raw(V4, [plain(V4, port)]): attached: true",
            )],
        },
        Mutant {
            name: "server-identity",
            attacks: &["wrong identity"],
            without: "the source's look who the server is",
            edits: &[Edit {
                file: "mesh-agent/src/tls/verify.rs",
                from: "if uris.contains(&expected) {",
                to: "if uris.contains(&expected) || !uris.is_empty() {",
            }],
            noticed_by: &[agent("proxy::tests::tls::whom_the_client_takes", "somebody else")],
        },
        Mutant {
            name: "foreign-identities",
            attacks: &["a node that asks for foreign identities"],
            without: "the look whether a Pod of the identity runs on the node that asks",
            edits: &[Edit {
                file: "mesh-control/src/certificates.rs",
                from: ".is_some_and(|identities| identities.contains(identity))",
                to: ".is_none_or(|identities| !identities.is_empty())",
            }],
            noticed_by: &[Noticed {
                suite: Suite::Control,
                test: "app::tests::certificates_are_signed_for_members_on_the_callers_node_only",
                says: "signed for a node that has no such Pod",
            }],
        },
        Mutant {
            name: "token-audience",
            attacks: &["a service-account token for another audience"],
            without: "the look whether a token's audience is the mesh",
            edits: &[Edit {
                file: REVIEWS,
                from: "if !status.audiences.iter().flatten().any(|audience| audience == AUDIENCE) {",
                to: "if status.authenticated.is_none() {",
            }],
            noticed_by: &[control(
                "kubernetes::reviews::tests::a_token_for_another_audience_is_refused",
                "a token for another audience was taken",
            )],
        },
        Mutant {
            name: "copied-proof",
            attacks: &["a proof that is copied to another Pod"],
            without: "the look whose proof it is that stands on a Pod",
            edits: &[Edit {
                file: "mesh-control/src/registry/convert.rs",
                from: ".filter(|_| annotations.get(CAPTURE_UID_ANNOTATION) == uid.as_ref());",
                to: ".filter(|_| annotations.get(CAPTURE_UID_ANNOTATION).is_some());",
            }],
            noticed_by: &[control(
                "control_plane::shared::tests::a_proof_of_another_uid_proves_nothing",
                "another Pod's proof counts: proven",
            )],
        },
        Mutant {
            name: "forgotten-proof",
            attacks: &["a proof that is taken away while no control plane runs"],
            without: "the agent's memory of who was proven",
            edits: &[Edit {
                file: "mesh-agent/src/state/mod.rs",
                from: "if was_proven && !workload.pod_uid.is_empty()",
                to: "if was_proven && workload.pod_uid.is_empty()",
            }],
            noticed_by: &[agent(
                "state::tests::a_pod_that_was_proven_is_not_pending_again_whatever_is_told",
                "is reached as pending",
            )],
        },
        Mutant {
            name: "foreign-notice",
            attacks: &["an Event about another node's Pod"],
            without: "the look whose node's a Pod is that people are told of",
            edits: &[Edit {
                file: "mesh-control/src/control_plane/notices.rs",
                from: "if !is_of_node(snapshot, node, word) {",
                to: "if !is_of_node(snapshot, node, word) && node.is_empty() {",
            }],
            noticed_by: &[control(
                "control_plane::notices::tests::an_agent_is_heard_of_the_pods_of_its_node_alone_and_not_of_those_that_are_refused",
                "an agent's word on another node's Pod is told",
            )],
        },
        Mutant {
            name: "token-account",
            attacks: &["a token of another service account"],
            without: "the look whether a token is of the agents' service account",
            edits: &[Edit {
                file: REVIEWS,
                from: "if user.username.as_deref() != Some(self.agents.username().as_str()) {",
                to: "if user.username.is_none() {",
            }],
            noticed_by: &[control(
                "kubernetes::reviews::tests::a_token_of_another_account_is_refused",
                "was taken, as of node-a",
            )],
        },
        Mutant {
            name: "token-node",
            attacks: &["a service-account token that is bound to no Pod on a node"],
            without: "the demand that a token names one node",
            edits: &[Edit {
                file: REVIEWS,
                from: "one(NODE_NAME).filter(|node| is_name(node)).ok_or(Refusal::Unbound)",
                to: "Ok(one(NODE_NAME).unwrap_or_else(|| self.agents.name.clone()))",
            }],
            noticed_by: &[control(
                "kubernetes::reviews::tests::a_token_without_a_pod_and_one_node_is_refused",
                "a token without one node was taken",
            )],
        },
    ],
    controls: &[
        CONTROL,
        (Suite::Agent, "proxy::tests::refuse::policy_decides_at_the_tunnel"),
        (
            Suite::Control,
            "authority::tests::the_root_is_kept_private_and_never_replaced",
        ),
    ],
};

pub const KUBELET: Group = Group {
    name: "kubelet",
    mutants: &[
        Mutant {
            name: "kubelet-cgroup",
            attacks: &["imitating the kubelet"],
            without: "the look whether who connects is in the kubelet's cgroup",
            edits: &[Edit {
                file: PROBES,
                from: "unsafe { bpf_get_current_cgroup_id() } == cgroup_id;",
                to: "unsafe { bpf_get_current_cgroup_id() } != 0 && cgroup_id != 0;",
            }],
            noticed_by: &[hooks(
                "probes::who_imitates_the_kubelet_is_steered_to_the_agent",
                "another cgroup to 10.99.0.2: past the agent",
            )],
        },
        Mutant {
            name: "kubelet-namespace",
            attacks: &["imitating the kubelet"],
            without: "the look whether who connects is in the node's network namespace",
            edits: &[Edit {
                file: PROBES,
                from: "    if netns_cookie != of_node {",
                to: "    if netns_cookie == 0 && of_node == 0 {",
            }],
            noticed_by: &[hooks(
                "probes::the_kubelet_of_another_node_on_this_kernel_is_steered_to_the_agent",
                "another namespace to 10.99.0.2: past the agent",
            )],
        },
        Mutant {
            name: "probe-port",
            attacks: &["a port that is not declared, by way of the kubelet"],
            without: "the look at the port: one that is declared opens the Pod",
            edits: &[Edit {
                file: PROBES,
                from: "        port,\n        _pad: 0,",
                to: "        port: if port == 0 { port } else { 8080 },\n        _pad: 0,",
            }],
            noticed_by: &[hooks(
                "probes::the_kubelet_reaches_the_port_that_is_declared_and_no_other",
                "an undeclared port of 10.99.0.2: past the agent",
            )],
        },
        Mutant {
            name: "kubelet-socket",
            attacks: &["a socket that was the kubelet's"],
            without: "forgetting whose connect the one before was",
            edits: &[Edit {
                file: PROBES,
                from: "            mark.is_kubelets = 0;",
                to: "            let _ = mark;",
            }],
            noticed_by: &[hooks(
                "probes::a_socket_that_was_the_kubelets_is_anybodys_once_another_connects_it",
                "a socket that was the kubelet's to 10.99.0.2: past the agent",
            )],
        },
        Mutant {
            name: "probe-end",
            attacks: &["the address and port of a probe that is over"],
            without: "the end of a vouch with its socket",
            edits: &[Edit {
                file: "mesh-ebpf/src/sockops.rs",
                from: "            probes::forget(&ends.upstream_key(mark.slot));",
                to: "            let _ = mark.slot;",
            }],
            noticed_by: &[hooks(
                "probes::a_vouch_is_of_no_use_to_who_has_its_tuple_next",
                "the tuple of a refused probe of 10.99.0.2: past the agent",
            )],
        },
        Mutant {
            name: "probe-age",
            attacks: &["the address and port of a probe that is over"],
            without: "the end of a vouch by its age",
            edits: &[Edit {
                file: PROBES,
                from: "saturating_sub(*connected_at_ns) > PROBE_VOUCH_NS {",
                to: "saturating_sub(*connected_at_ns) > PROBE_VOUCH_NS << 20 {",
            }],
            noticed_by: &[hooks(
                "probes::a_vouch_whose_end_nobody_saw_counts_for_a_while_alone",
                "an old vouch for 10.99.0.2: past the agent",
            )],
        },
    ],
    controls: &[CONTROL],
};

pub const REDIRECT: Group = Group {
    name: "redirect",
    mutants: &[
        Mutant {
            name: "redirect",
            attacks: &["TCP Fast Open", "io_uring"],
            without: "the redirect",
            edits: &[Edit {
                file: CONNECT,
                from: "    count(Counter::Redirected);\n    Decision::Redirect",
                to: "    count(Counter::Redirected);\n    Decision::LeaveAlone",
            }],
            noticed_by: &[
                hooks(
                    "attacks::fast_open_does_not_get_past",
                    "Fast Open to 10.99.0.1: past the agent",
                ),
                hooks("attacks::io_uring_does_not_get_past", "io_uring to 10.99.0.1: past the agent"),
                hooks(
                    "attacks::a_pods_application_gets_no_connection_by_trying_often",
                    "one got past the agent",
                ),
            ],
        },
        Mutant {
            name: "rewritten-address",
            attacks: &["rewriting what the agent sends"],
            without: "the backstop's look whether a packet has its socket's addresses",
            edits: &[Edit {
                file: TCX,
                from: "    source == segment.source && destination == segment.destination\n",
                to: "    source == segment.source || destination != segment.destination\n",
            }],
            noticed_by: &[hooks(
                "backstop::a_pass_through_that_root_rewrites_does_not_reach_the_mesh",
                "reached the mesh in clear: [(\"198.51.100.9\", 8080",
            )],
        },
        Mutant {
            name: "rewritten-port",
            attacks: &["rewriting what the agent sends"],
            without: "the backstop's look whether a packet has its socket's ports",
            edits: &[Edit {
                file: TCX,
                from: "|| u32::from(u16::from_be(field!(socket, dst_port))) != ports & 0xffff {",
                to: "{",
            }],
            noticed_by: &[hooks(
                "backstop::a_tunnel_that_root_rewrites_does_not_reach_an_application",
                "reached the mesh in clear: [(\"10.99.0.1\", 15008",
            )],
        },
    ],
    controls: &[CONTROL],
};
