//! What the agent itself checks, tried on a whole mesh: by a Pod that has a good place in it, and by processes without rights.

use super::{Edit, Group, Mutant, Noticed, Suite};

const INBOUND: &str = "mesh-agent/src/proxy/inbound.rs";
const TLS: &str = "mesh-agent/src/tls.rs";
const VERIFY: &str = "mesh-agent/src/tls/verify.rs";
const CONFIG: &str = "mesh-agent/src/config.rs";

const fn attacks(test: &'static str, says: &'static str) -> Noticed {
    Noticed {
        suite: Suite::Attacks,
        test,
        says,
    }
}

pub const TUNNEL: Group = Group {
    name: "tunnel",
    mutants: &[
        Mutant {
            name: "authority-of-another-pod",
            attacks: &["`:authority` naming another Pod"],
            without: "the look whether the authority is the address that the tunnel was opened to",
            edits: &[Edit {
                file: INBOUND,
                from: "destination.ip() == local &&",
                to: "(destination.ip() == local || destination.port() != 0) &&",
            }],
            noticed_by: &[attacks(
                "an_authority_that_names_another_pod",
                "the agent at 10.61.2.20 tried to connect to 10.61.2.21:9000",
            )],
        },
        Mutant {
            name: "authority-of-the-agent",
            attacks: &["`:authority` naming the agent", "an agent's port as mesh destination"],
            without: "the destination's refusal of an agent's port",
            edits: &[Edit {
                file: INBOUND,
                from: "!mesh_common::is_agent_port(destination.port())",
                to: "destination.port() != 0",
            }],
            noticed_by: &[attacks(
                "an_authority_that_names_the_agent",
                "the agent at 10.61.2.20 tried to connect to 10.61.2.20:15001",
            )],
        },
        Mutant {
            name: "identity-of-another-address",
            attacks: &["wrong identity", "a client certificate of another node's Pod"],
            without: "the look whether the certificate's holder lives at the peer's address",
            // Asked once before the decision, and once after it, for an address that changes hands in between.
            edits: &[
                Edit {
                    file: "mesh-agent/src/proxy/authorize.rs",
                    from: ".filter(|workload| workload.identity == *identity)",
                    to: ".filter(|workload| workload.identity == *identity || workload.identity != *identity)",
                },
                Edit {
                    file: "mesh-agent/src/proxy/proof.rs",
                    from: ".is_some_and(|holder| holder.identity == self.peer.0)",
                    to: ".is_some_and(|holder| holder.identity == self.peer.0 || holder.identity != self.peer.0)",
                },
            ],
            noticed_by: &[attacks(
                "a_certificate_of_another_nodes_pod",
                "another node's Pod was answered 200",
            )],
        },
        Mutant {
            name: "trust-domain",
            attacks: &["wrong trust domain"],
            without: "the look at the client's trust domain",
            edits: &[Edit {
                file: VERIFY,
                from: "if identity.trust_domain == self.trust_domain {",
                to: "if identity.trust_domain == self.trust_domain || !identity.trust_domain.is_empty() {",
            }],
            noticed_by: &[attacks(
                "a_certificate_of_another_trust_domain",
                "another trust domain's got through the handshake",
            )],
        },
        Mutant {
            name: "validity",
            attacks: &["expired certificate", "not-yet-valid certificate"],
            without: "the look at when a client's certificate is valid",
            edits: &[Edit {
                file: VERIFY,
                from: "let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;",
                to: "let verified = match self.chain.verify_client_cert(end_entity, intermediates, now) {
            Err(Error::InvalidCertificate(
                CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. },
            )) => ClientCertVerified::assertion(),
            verified => verified?,
        };",
            }],
            noticed_by: &[
                attacks("an_expired_certificate", "an expired one got through the handshake"),
                attacks(
                    "a_certificate_that_is_not_valid_yet",
                    "one that is not valid yet got through the handshake",
                ),
            ],
        },
        Mutant {
            name: "no-certificate",
            attacks: &["missing certificate"],
            without: "the demand for a certificate: who shows none is taken for who came first",
            edits: &[
                Edit {
                    file: VERIFY,
                    from: "    fn root_hint_subjects(&self)",
                    to: "    fn client_auth_mandatory(&self) -> bool {\n        false\n    }\n\n    fn root_hint_subjects(&self)",
                },
                Edit {
                    file: TLS,
                    from: "        .ok_or_else(|| TlsError::PeerCertificate(\"there is none\".into()))?;",
                    to: "        .or_else(|| FIRST.get())
        .ok_or_else(|| TlsError::PeerCertificate(\"there is none\".into()))?;
    static FIRST: std::sync::OnceLock<CertificateDer<'static>> = std::sync::OnceLock::new();
    let _ = FIRST.set(leaf.clone().into_owned());",
                },
            ],
            noticed_by: &[attacks(
                "no_certificate",
                "one without a certificate got through the handshake",
            )],
        },
        Mutant {
            name: "tls-1.2",
            attacks: &["TLS 1.2"],
            without: "the server's minimum of TLS 1.3",
            edits: &[
                Edit {
                    file: TLS,
                    from: "ServerConfig::builder_with_provider(provider)\n            .with_protocol_versions(&[&rustls::version::TLS13])",
                    to: "ServerConfig::builder_with_provider(provider)\n            .with_protocol_versions(rustls::ALL_VERSIONS)",
                },
                Edit {
                    file: TLS,
                    from: "cipher_suites: vec![cipher_suite::TLS13_AES_256_GCM_SHA384,",
                    to: "cipher_suites: vec![cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, cipher_suite::TLS13_AES_256_GCM_SHA384,",
                },
                Edit {
                    file: VERIFY,
                    from: "        Err(tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain",
                    to: "        self.chain.verify_tls12_signature(_message, _cert, _dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain",
                },
            ],
            noticed_by: &[attacks("tls_1_2", "one that speaks TLS 1.2 got through the handshake")],
        },
        Mutant {
            name: "alpn",
            attacks: &["no ALPN"],
            without: "the demand for a protocol's name",
            edits: &[Edit {
                file: TLS,
                from: "if connection.alpn_protocol() != Some(ALPN) {",
                to: "if connection.alpn_protocol().is_some_and(|protocol| protocol != ALPN) {",
            }],
            noticed_by: &[attacks("no_alpn", "one without ALPN got through the handshake")],
        },
        Mutant {
            name: "forwarded",
            attacks: &["a lying `forwarded` header"],
            without: "an address that is the tunnel's own: the header is believed",
            edits: &[
                Edit {
                    file: INBOUND,
                    from: "        destination,\n        request.into_body(),",
                    to: "        destination,\n        claimed(&request),\n        request.into_body(),",
                },
                Edit {
                    file: INBOUND,
                    from: "    destination: Option<SocketAddr>,\n    receive: RecvStream,",
                    to: "    destination: Option<SocketAddr>,\n    claimed: Option<IpAddr>,\n    receive: RecvStream,",
                },
                Edit {
                    file: INBOUND,
                    from: "authorize(proxy, context, Some(&tunnel.identity), tunnel.peer.ip(), destination, record)",
                    to: "authorize(proxy, context, Some(&tunnel.identity), claimed.unwrap_or(tunnel.peer.ip()), destination, record)",
                },
                Edit {
                    file: INBOUND,
                    from: "async fn carry(",
                    to: "fn claimed(request: &Request<RecvStream>) -> Option<IpAddr> {
    let header = request.headers().get(\"forwarded\")?.to_str().ok()?;
    let address: SocketAddr = header.strip_prefix(\"for=\")?.trim_matches('\"').parse().ok()?;
    Some(address.ip())
}

async fn carry(",
                },
            ],
            noticed_by: &[attacks(
                "a_forwarded_header_that_lies",
                "who claims another address was answered 200",
            )],
        },
        Mutant {
            name: "opting-out",
            attacks: &["a Pod that leaves the mesh"],
            without: "asking DENY about Pods outside of the mesh as well",
            edits: &[Edit {
                file: "mesh-agent/src/proxy/authorize.rs",
                from: "(state.by_address(source_ip), state.settings().clone())",
                to: "(
                state
                    .by_address(source_ip)
                    .filter(|workload| workload.membership != crate::workload::Membership::Outside),
                state.settings().clone(),
            )",
            }],
            noticed_by: &[Noticed {
                suite: Suite::Agent,
                test: "proxy::tests::refuse::whom_deny_names_does_not_come_in_by_opting_out",
                says: "the application answered whom DENY names, since he left the mesh",
            }],
        },
        Mutant {
            name: "static-pod",
            attacks: &["a node that shows Pods of its own making"],
            without: "the refusal of static Pods",
            edits: &[Edit {
                file: "mesh-control/src/compile/membership.rs",
                from: "    if pod.is_static {",
                to: "    if pod.is_static && pod.host_network {",
            }],
            noticed_by: &[Noticed {
                suite: Suite::Control,
                test: "compile::membership::tests::a_static_pod_gives_its_node_no_identity",
                says: "a node was given the identity of Pods that it alone shows",
            }],
        },
        Mutant {
            name: "unlisted-pod",
            attacks: &["a Pod that outlives its object"],
            without: "the look whether processes of a Pod run that is not listed any longer",
            edits: &[Edit {
                file: "mesh-agent/src/pods/plan.rs",
                from: "None if !list.is_cut => plan.vanished.push(uid.clone()),",
                to: "None if !list.is_cut => plan.release.push(uid.clone()),",
            }],
            noticed_by: &[Noticed {
                suite: Suite::Enrolment,
                test: "a_process_of_a_pod_in_anothers_namespace_enrols_nothing",
                says: "a Pod that runs was let go",
            }],
        },
        Mutant {
            name: "decoy-namespace",
            attacks: &["a network namespace of a Pod's own making"],
            without: "the look whether processes run in the namespace that is enrolled",
            edits: &[Edit {
                file: "mesh-agent/src/pods/following.rs",
                from: ".inhabited(std::slice::from_ref(&uid)).await?.is_empty() {",
                to: ".inhabited(&[]).await?.is_empty() {",
            }],
            noticed_by: &[Noticed {
                suite: Suite::Enrolment,
                test: "a_namespace_that_a_pod_makes_with_its_address_is_no_pods",
                says: "the Pod's own namespace was let go for a decoy",
            }],
        },
        Mutant {
            name: "plaintext-agent-port",
            attacks: &["a direct connection to an agent port"],
            without: "the destination's refusal of plaintext to an agent's port (the look at its own upstreams then ends the loop)",
            edits: &[Edit {
                file: "mesh-agent/src/proxy/plaintext.rs",
                from: "    if mesh_common::is_agent_port(destination.port()) {",
                to: "    if mesh_common::is_agent_port(destination.port()) && destination.port() == 0 {",
            }],
            noticed_by: &[attacks("plaintext_to_the_agents_ports", "was not refused as an agent's port")],
        },
        Mutant {
            name: "admin-page",
            attacks: &["a direct connection to an agent port"],
            without: "an admin page that is only on loopback",
            edits: &[
                Edit {
                    file: CONFIG,
                    from: "default_value = \"127.0.0.1:15000\"",
                    to: "default_value = \"[::]:15000\"",
                },
                Edit {
                    file: CONFIG,
                    from: "if address.ip().to_canonical().is_loopback() {",
                    to: "if address.ip().to_canonical().is_loopback() || address.port() != 0 {",
                },
            ],
            noticed_by: &[attacks("the_nodes_admin_page_from_a_pod", "reached the admin page")],
        },
        Mutant {
            name: "local-socket",
            attacks: &["a process without rights at the sockets"],
            without: "the look who connects to agent.sock and cni.sock",
            edits: &[Edit {
                file: "mesh-agent/src/local/socket.rs",
                from: "    uid == 0\n",
                to: "    uid < u32::MAX\n",
            }],
            noticed_by: &[
                attacks("the_local_socket_without_rights", "the agent answered nobody"),
                attacks(
                    "the_plugins_socket_without_rights",
                    "the agent answered a plugin without rights",
                ),
            ],
        },
        Mutant {
            name: "handover-socket",
            attacks: &["a process without rights at the sockets"],
            without: "the look who connects to handover.sock",
            edits: &[Edit {
                file: "mesh-agent/src/local/handover.rs",
                from: "peer.uid() == 0",
                to: "peer.uid() < u32::MAX",
            }],
            noticed_by: &[attacks(
                "the_handover_socket_without_rights",
                "the agent answered a successor without rights",
            )],
        },
    ],
    controls: &[
        (Suite::Attacks, "a_good_peer_is_served"),
        (Suite::Enrolment, "what_cannot_be_enrolled_is_said"),
        (Suite::Agent, "proxy::tests::refuse::policy_decides_at_the_tunnel"),
        (
            Suite::Control,
            "authority::tests::the_root_is_kept_private_and_never_replaced",
        ),
    ],
};
