mod services;

use mesh_proto::mesh::settings::Mtls as WireMtls;
use mesh_proto::mesh::{Cidr, NamespaceMtls};
use mesh_proto::security::{
    Action as WireAction, Address as Block, Authorization, Clause, Match, Rule, ServiceAccountMatch, StringMatch, string_match,
};
use mesh_proto::workload::Extension;
use mesh_proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, SETTINGS_TYPE_URL};
use mesh_proto::{MAX_REVOKED, MAX_TRUSTED_ROOTS};
use prost_types::Any;

use super::*;
use crate::policy::{Action, Policy};

fn resource(name: &str, type_url: &str, value: Vec<u8>) -> Resource {
    Resource {
        name: name.to_owned(),
        resource: Some(Any {
            type_url: type_url.to_owned(),
            value,
        }),
        ..Resource::default()
    }
}

fn wire_workload() -> WireWorkload {
    WireWorkload {
        uid: "c//Pod/shop/web".to_owned(),
        name: "web".to_owned(),
        namespace: "shop".to_owned(),
        service_account: "web".to_owned(),
        addresses: vec![
            vec![10, 0, 0, 1],
            [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1].to_vec(),
        ],
        ..WireWorkload::default()
    }
}

fn with_capture(state: i32, tunnel: TunnelProtocol) -> WireWorkload {
    let capture = Capture {
        state,
        pod_uid: "uid-1".to_owned(),
    };
    WireWorkload {
        tunnel_protocol: tunnel.into(),
        extensions: vec![Extension {
            name: CAPTURE_EXTENSION.to_owned(),
            config: Some(Any {
                type_url: CAPTURE_TYPE_URL.to_owned(),
                value: capture.encode_to_vec(),
            }),
        }],
        ..wire_workload()
    }
}

fn fails_at(result: Result<Workload, ProtoError>, expected: &str) {
    match result {
        Err(ProtoError::Field { field, .. }) => assert_eq!(field, expected),
        other => panic!("{expected}: {other:?}"),
    }
}

#[test]
fn a_workload_with_its_defaults() {
    let workload = Workload::try_from(wire_workload()).unwrap();
    assert_eq!(workload.identity.to_string(), "spiffe://cluster.local/ns/shop/sa/web");
    assert_eq!(
        workload.addresses,
        ["10.0.0.1".parse::<IpAddr>().unwrap(), "2001:db8::1".parse().unwrap()]
    );
    assert_eq!(
        (workload.membership, &*workload.workload_name, &*workload.canonical_name),
        (Membership::Outside, "web", "web")
    );
}

#[test]
fn a_workloads_errors_name_their_field() {
    fails_at(
        Workload::try_from(WireWorkload {
            uid: String::new(),
            ..wire_workload()
        }),
        "uid",
    );
    fails_at(
        Workload::try_from(WireWorkload {
            name: String::new(),
            ..wire_workload()
        }),
        "name",
    );
    fails_at(
        Workload::try_from(WireWorkload {
            addresses: vec![vec![1, 2, 3]],
            ..wire_workload()
        }),
        "addresses",
    );
    fails_at(
        Workload::try_from(WireWorkload {
            service_account: "a/b".to_owned(),
            ..wire_workload()
        }),
        "service_account",
    );
    fails_at(
        Workload::try_from(WireWorkload {
            trust_domain: "a b".to_owned(),
            ..wire_workload()
        }),
        "service_account",
    );
    fails_at(
        Workload::try_from(WireWorkload {
            tunnel_protocol: 9,
            ..wire_workload()
        }),
        "tunnel_protocol",
    );
    fails_at(
        Workload::try_from(WireWorkload {
            network_mode: 9,
            ..wire_workload()
        }),
        "network_mode",
    );
}

#[test]
fn a_workload_on_the_hosts_network() {
    assert!(!Workload::try_from(wire_workload()).unwrap().host_network);
    let on_host = Workload::try_from(WireWorkload {
        network_mode: NetworkMode::HostNetwork.into(),
        ..wire_workload()
    });
    assert!(on_host.unwrap().host_network);
}

#[test]
fn membership_comes_from_the_extension_and_else_from_the_tunnel_protocol() {
    let membership = |wire| Workload::try_from(wire).map(|workload| workload.membership);
    let hbone = WireWorkload {
        tunnel_protocol: TunnelProtocol::Hbone.into(),
        ..wire_workload()
    };
    assert_eq!(membership(hbone).unwrap(), Membership::Proven);
    for (state, tunnel, expected) in [
        (capture::State::Pending, TunnelProtocol::None, Membership::Pending),
        (capture::State::Proven, TunnelProtocol::Hbone, Membership::Proven),
        (capture::State::Lost, TunnelProtocol::None, Membership::Lost),
        (capture::State::Lost, TunnelProtocol::Hbone, Membership::Lost),
    ] {
        assert_eq!(membership(with_capture(state.into(), tunnel)).unwrap(), expected);
    }
    // Never cleartext by a state that we do not understand.
    for (state, tunnel) in [
        (0, TunnelProtocol::None),
        (77, TunnelProtocol::Hbone),
        (2, TunnelProtocol::None),
    ] {
        assert!(membership(with_capture(state, tunnel)).is_err());
    }
}

#[test]
fn a_resource_holds_what_its_name_says() {
    let bytes = Address {
        r#type: Some(address::Type::Workload(wire_workload())),
    }
    .encode_to_vec();
    assert!(matches!(
        super::address(&resource("c//Pod/shop/web", ADDRESS_TYPE_URL, bytes.clone())),
        Ok(Change::Workload(_))
    ));
    assert!(matches!(
        super::address(&resource("c//Pod/shop/other", ADDRESS_TYPE_URL, bytes)),
        Err(ProtoError::Name { .. })
    ));
}

#[test]
fn settings() {
    let wire = WireSettings {
        trust_domain: String::new(),
        pod_ranges: vec![Cidr {
            address: vec![10, 1, 2, 3],
            length: 16,
        }],
        trust_bundle: vec![root_pem()],
        revoked_identities: vec!["spiffe://cluster.local/ns/shop/sa/gone".to_owned()],
        ..WireSettings::default()
    };
    let settings = Settings::try_from(wire.clone()).unwrap();
    assert_eq!(
        (settings.trust_domain.as_str(), settings.pod_ranges[0].to_string().as_str()),
        ("cluster.local", "10.1.0.0/16")
    );
    assert_eq!(settings.trust_bundle.map(|bundle| bundle.len()), Some(1));
    assert!(settings.revoked.contains(&Identity::new("cluster.local", "shop", "gone")));
    assert_eq!(Settings::try_from(WireSettings::default()).unwrap().trust_bundle, None);
    for (named, broken) in [
        ("trust_bundle", vec!["pem".to_owned()]),
        ("trust_bundle", vec![root_pem(); MAX_TRUSTED_ROOTS + 1]),
    ] {
        let trust_bundle = broken;
        let broken = WireSettings {
            trust_bundle,
            ..wire.clone()
        };
        assert!(matches!(Settings::try_from(broken), Err(ProtoError::Field { field, .. }) if field == named));
    }
    for revoked_identities in [
        vec!["nobody".to_owned()],
        vec!["spiffe://cluster.local/ns/shop/sa/gone".to_owned(); MAX_REVOKED + 1],
    ] {
        let broken = WireSettings {
            revoked_identities,
            ..wire.clone()
        };
        assert!(matches!(
            Settings::try_from(broken),
            Err(ProtoError::Field {
                field: "revoked_identities",
                ..
            })
        ));
    }
    for (address, length) in [(vec![10, 0], 8), (vec![10, 0, 0, 0], 33), (vec![10, 0, 0, 0], 1000)] {
        let broken = WireSettings {
            pod_ranges: vec![Cidr { address, length }],
            ..wire.clone()
        };
        assert!(matches!(
            Settings::try_from(broken),
            Err(ProtoError::Field { field: "pod_ranges", .. })
        ));
    }
    assert!(super::settings(&resource("other", SETTINGS_TYPE_URL, wire.encode_to_vec())).is_err());
}

fn root_pem() -> String {
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem()
}

fn cidr(address: &[u8], length: u32) -> Cidr {
    Cidr {
        address: address.to_vec(),
        length,
    }
}

#[test]
fn settings_of_mutual_tls_and_exclusions() {
    let of = |namespace: &str, mtls: i32| NamespaceMtls {
        namespace: namespace.to_owned(),
        mtls,
    };
    let (permissive, strict) = (WireMtls::Permissive.into(), WireMtls::Strict.into());
    let wire = WireSettings {
        mtls: strict,
        namespaces: vec![
            of("legacy", permissive),
            of("future", 9),
            of("twice", strict),
            of("twice", permissive),
        ],
        excluded_ports: vec![22, 9100],
        excluded_cidrs: vec![cidr(&[169, 254, 0, 0], 16), cidr(&[0xfd; 16], 8)],
        ..WireSettings::default()
    };
    let settings = Settings::try_from(wire.clone()).unwrap();
    let strict = ["shop", "legacy", "future", "twice"].map(|namespace| settings.is_strict(namespace));
    assert_eq!(strict, [true, false, true, true], "what is not known is STRICT");
    let excludes = |text: &str| {
        let address: std::net::SocketAddr = text.parse().unwrap();
        settings.excluded.contains(address.ip(), address.port())
    };
    for (address, expected) in [
        ("10.0.0.1:22", true),
        ("10.0.0.1:23", false),
        ("169.254.1.1:80", true),
        ("[::ffff:169.254.1.1]:80", true),
        ("[fd00::1]:80", true),
        ("[fe00::1]:80", false),
        ("169.254.1.1:15008", false),
    ] {
        assert_eq!(excludes(address), expected, "{address}");
    }
    for unknown in [-1, 3] {
        let all = WireSettings {
            mtls: unknown,
            ..WireSettings::default()
        };
        assert!(Settings::try_from(all).unwrap().is_strict("shop"), "{unknown}");
    }
    assert!(!Settings::try_from(WireSettings::default()).unwrap().is_strict("shop"));

    let ports = |ports: Vec<u32>| WireSettings {
        excluded_ports: ports,
        ..wire.clone()
    };
    for broken in [ports(vec![0]), ports(vec![65_536]), ports((1..=65).collect())] {
        let error = Settings::try_from(broken).unwrap_err();
        assert!(
            matches!(
                error,
                ProtoError::Field {
                    field: "excluded_ports",
                    ..
                }
            ),
            "{error}"
        );
    }
    for ranges in [
        vec![cidr(&[10, 0], 8)],
        vec![cidr(&[10, 0, 0, 0], 33)],
        vec![cidr(&[10, 0, 0, 0], 8); 65],
    ] {
        let broken = WireSettings {
            excluded_cidrs: ranges,
            ..wire.clone()
        };
        let error = Settings::try_from(broken).unwrap_err();
        assert!(
            matches!(
                error,
                ProtoError::Field {
                    field: "excluded_cidrs",
                    ..
                }
            ),
            "{error}"
        );
    }
}

fn exact(text: &str) -> StringMatch {
    StringMatch {
        match_type: Some(string_match::MatchType::Exact(text.to_owned())),
    }
}

fn wire_authorization(conditions: Vec<Match>) -> Authorization {
    Authorization {
        name: "policy".to_owned(),
        namespace: "shop".to_owned(),
        action: WireAction::Allow.into(),
        rules: vec![Rule {
            clauses: vec![Clause { matches: conditions }],
        }],
        ..Authorization::default()
    }
}

fn policy(bytes: Vec<u8>) -> Policy {
    match super::authorization(&resource("shop/policy", AUTHORIZATION_TYPE_URL, bytes)) {
        Ok(Change::Policy(policy)) => (*policy).clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_authorization_that_is_wholly_known() {
    let condition = Match {
        principals: vec![exact("cluster.local/ns/shop/sa/web")],
        not_namespaces: vec![StringMatch {
            match_type: Some(string_match::MatchType::Prefix("kube-".to_owned())),
        }],
        source_ips: vec![Block {
            address: vec![10, 0, 0, 0],
            length: 8,
        }],
        destination_ports: vec![80, 443],
        service_accounts: vec![ServiceAccountMatch {
            namespace: "a".to_owned(),
            service_account: "b".to_owned(),
        }],
        ..Match::default()
    };
    let policy = policy(wire_authorization(vec![condition]).encode_to_vec());
    assert!(!policy.has_unknown_part());
    assert_eq!((&*policy.name, policy.action), ("shop/policy", Action::Allow));
    assert_eq!(policy.rules[0].clauses[0].matches[0].destination_ports, [80, 443]);
}

#[test]
fn values_that_mean_nothing_to_us_fail_closed() {
    let unknown = [
        Match {
            principals: vec![StringMatch::default()],
            ..Match::default()
        },
        Match {
            source_ips: vec![Block {
                address: vec![10],
                length: 8,
            }],
            ..Match::default()
        },
        Match {
            not_source_ips: vec![Block {
                address: vec![10, 0, 0, 0],
                length: 33,
            }],
            ..Match::default()
        },
        Match {
            destination_ports: vec![70_000],
            ..Match::default()
        },
        Match {
            service_accounts: vec![ServiceAccountMatch::default()],
            ..Match::default()
        },
    ];
    for condition in unknown {
        let shown = format!("{condition:?}");
        let bytes = wire_authorization(vec![condition]).encode_to_vec();
        assert!(policy(bytes).rules[0].clauses[0].matches[0].unknown, "{shown}");
    }
}

/// Field 200, a varint: in no message of an authorization.
const UNKNOWN_FIELD: [u8; 3] = [0xc0, 0x0c, 0x01];

fn nested(field: u8, inside: Vec<u8>) -> Vec<u8> {
    let mut bytes = vec![field << 3 | 2, u8::try_from(inside.len()).unwrap()];
    bytes.extend(inside);
    bytes
}

#[test]
fn an_unknown_field_at_any_depth_marks_its_rule_and_no_other() {
    // rule 5 → clause 1 → match 2 → principals 3 / source_ips 5
    let in_string = nested(1, nested(2, nested(3, UNKNOWN_FIELD.to_vec())));
    let in_block = nested(1, nested(2, nested(5, UNKNOWN_FIELD.to_vec())));
    let in_match = nested(1, nested(2, UNKNOWN_FIELD.to_vec()));
    let in_extension = nested(1, nested(2, nested(13, vec![])));
    let in_clause = nested(1, UNKNOWN_FIELD.to_vec());
    let in_rule = UNKNOWN_FIELD.to_vec();
    for (depth, rule) in [in_string, in_block, in_match, in_extension, in_clause, in_rule]
        .into_iter()
        .enumerate()
    {
        let mut bytes = wire_authorization(vec![Match {
            destination_ports: vec![80],
            ..Match::default()
        }])
        .encode_to_vec();
        bytes.extend(nested(5, rule));
        let policy = policy(bytes);
        assert_eq!(
            policy.rules.iter().map(|rule| rule.unknown).collect::<Vec<_>>(),
            [false, true],
            "depth {depth}"
        );
        assert!(policy.has_unknown_part());
    }
}

#[test]
fn an_unknown_field_action_or_scope_of_the_whole_marks_every_rule() {
    let known = wire_authorization(vec![Match {
        destination_ports: vec![80],
        ..Match::default()
    }]);
    let mut with_field = known.encode_to_vec();
    with_field.extend(UNKNOWN_FIELD);
    let action = Authorization {
        action: 9,
        ..known.clone()
    }
    .encode_to_vec();
    let scope = Authorization { scope: 9, ..known }.encode_to_vec();
    for bytes in [with_field, action.clone(), scope] {
        assert!(policy(bytes).rules.iter().all(|rule| rule.unknown));
    }
    assert_eq!(policy(action).action, Action::Deny);
}

#[test]
fn an_unknown_part_of_the_whole_denies_even_without_rules() {
    let without_rules = Authorization {
        name: "policy".to_owned(),
        namespace: "shop".to_owned(),
        action: WireAction::Deny.into(),
        ..Authorization::default()
    };
    assert!(
        policy(without_rules.encode_to_vec()).rules.is_empty(),
        "wholly known: never matches"
    );
    let mut with_field = without_rules.encode_to_vec();
    with_field.extend(UNKNOWN_FIELD);
    let with_action = Authorization {
        action: 9,
        ..without_rules.clone()
    };
    let with_scope = Authorization {
        scope: 9,
        ..without_rules
    };
    for bytes in [with_field, with_action.encode_to_vec(), with_scope.encode_to_vec()] {
        let policy = policy(bytes);
        assert_eq!(policy.action, Action::Deny);
        assert!(policy.rules.iter().any(|rule| rule.unknown), "{policy:?}");
    }
}

#[test]
fn an_unknown_scope_is_the_widest() {
    for (namespace, scope) in [("shop", Scope::Namespace), (ROOT_NAMESPACE, Scope::Global)] {
        let wire = Authorization {
            namespace: namespace.to_owned(),
            scope: 9,
            ..wire_authorization(vec![])
        };
        let name = format!("{namespace}/policy");
        let change = super::authorization(&resource(&name, AUTHORIZATION_TYPE_URL, wire.encode_to_vec()));
        assert!(
            matches!(change, Ok(Change::Policy(policy)) if policy.scope == scope),
            "{namespace}"
        );
    }
}

proptest::proptest! {
    #[test]
    fn bytes_never_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
        let _ = unknown_fields::of_authorization(&bytes);
        for decode in [super::address, super::authorization, super::settings] {
            let _ = decode(&resource("mesh", "x", bytes.clone()));
        }
    }
}
