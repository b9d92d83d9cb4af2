use mesh_proto::workload::{Extension, LoadBalancing, NetworkAddress, Port};
use prost_types::Any;

use super::*;

#[test]
fn a_service_has_its_virtual_addresses_only() {
    let address = |address: &[u8], length| NetworkAddress {
        address: address.to_vec(),
        length,
        ..NetworkAddress::default()
    };
    let wire = WireService {
        name: "web".to_owned(),
        namespace: "shop".to_owned(),
        hostname: "web.shop.svc.cluster.local".to_owned(),
        addresses: vec![
            address(&[10, 96, 0, 1], None),
            address(&[10, 97, 0, 0], Some(16)),
            address(&[0; 4], None),
            address(&[10, 96, 0, 2], Some(32)),
        ],
        ports: vec![Port {
            service_port: 80,
            target_port: 8080,
            ..Port::default()
        }],
        ..WireService::default()
    };
    let service = Service::try_from(wire.clone()).unwrap();
    assert_eq!(
        service.addresses,
        ["10.96.0.1".parse::<IpAddr>().unwrap(), "10.96.0.2".parse().unwrap()]
    );
    assert_eq!(service.ports, [crate::workload::ServicePort { port: 80, target: 8080 }]);
    let mut broken = wire;
    broken.ports[0].service_port = 65_536;
    assert!(matches!(
        Service::try_from(broken),
        Err(ProtoError::Field { field: "ports", .. })
    ));
}

#[test]
fn a_service_tells_which_endpoints_a_client_gets() {
    let service = |balancing: Option<LoadBalancing>, affinity: Option<(&str, u32)>| {
        let extension = affinity.map(|(type_url, timeout_seconds)| Extension {
            name: AFFINITY_EXTENSION.to_owned(),
            config: Some(Any {
                type_url: type_url.to_owned(),
                value: SessionAffinity { timeout_seconds }.encode_to_vec(),
            }),
        });
        Service::try_from(WireService {
            namespace: "shop".to_owned(),
            hostname: "web.shop.svc.cluster.local".to_owned(),
            load_balancing: balancing,
            extensions: extension.into_iter().collect(),
            ..WireService::default()
        })
    };
    let prefers = |mode: Mode, scopes: &[RoutingScope]| {
        Some(LoadBalancing {
            mode: mode.into(),
            routing_preference: scopes.iter().map(|scope| i32::from(*scope)).collect(),
            ..LoadBalancing::default()
        })
    };
    let plain = service(None, None).unwrap();
    assert!(plain.only_healthy && !plain.node_local && plain.affinity.is_none());
    for (mode, scopes, local) in [
        (Mode::Strict, &[RoutingScope::Node][..], true),
        (Mode::Strict, &[RoutingScope::Zone], false),
        (Mode::Failover, &[RoutingScope::Zone, RoutingScope::Node], false),
        (Mode::UnspecifiedMode, &[], false),
    ] {
        let service = service(prefers(mode, scopes), None).unwrap();
        assert_eq!(
            (service.node_local, service.only_healthy),
            (local, true),
            "{mode:?} {scopes:?}"
        );
    }
    let keeps = service(None, Some((AFFINITY_TYPE_URL, 7))).unwrap();
    assert_eq!(keeps.affinity, Some(std::time::Duration::from_secs(7)));
    for wrong in [("type.example/other", 7), (AFFINITY_TYPE_URL, 0), (AFFINITY_TYPE_URL, 86_401)] {
        let error = service(None, Some(wrong)).unwrap_err();
        assert!(matches!(error, ProtoError::Field { field: "extensions", .. }), "{error}");
    }
}
