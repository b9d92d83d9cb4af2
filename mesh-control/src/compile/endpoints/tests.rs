use mesh_proto::{ADDRESS_TYPE_URL, workload};
use prost::Message as _;

use super::super::testing::{parameters, world};
use super::super::{EndpointSource, Snapshot, compile};
use crate::capture_states::CaptureStates;
use crate::objects::{Kind, ObjectId};
use crate::registry::convert;

const SERVICE: &str = "shop/web.shop.svc.cluster.local";
const PODS: &str = "
kind: Namespace
metadata: {name: shop, labels: {culvert.dev/mesh: enabled}}
---
kind: Pod
metadata: {name: a, namespace: shop, uid: u-a, labels: {app: web}}
spec: {nodeName: n, containers: [{name: c, ports: [{name: http, containerPort: 1}]}]}
status: {podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}]}
---
kind: Pod
metadata: {name: b, namespace: shop, uid: u-b, labels: {app: web}}
spec: {nodeName: n}
status: {podIPs: [{ip: 10.0.0.2}]}
---
kind: Pod
metadata: {name: elsewhere, namespace: other, uid: u-e}
spec: {nodeName: n}
status: {podIPs: [{ip: 10.0.0.3}]}
---
kind: Pod
metadata: {name: host, namespace: shop, uid: u-h}
spec: {nodeName: n, hostNetwork: true}
status: {podIPs: [{ip: 192.0.2.1}]}
---
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIPs: [10.96.0.1]
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: http}, {name: raw, port: 90, targetPort: 91}]
";

fn compiled(slices: &[&str]) -> Snapshot {
    let text = std::iter::once(PODS)
        .chain(slices.iter().copied())
        .collect::<Vec<_>>()
        .join("---\n");
    let parameters = parameters(EndpointSource::Slices);
    compile(&world(&text), &CaptureStates::default(), &parameters)
}

fn slice(name: &str, endpoints: &str) -> String {
    format!(
        "kind: EndpointSlice\nmetadata: {{name: {name}, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}\n\
         addressType: IPv4\nports: [{{name: http, port: 8080}}, {{name: raw, port: 91}}, {{name: dns, port: 53, protocol: UDP}}]\n\
         endpoints: {endpoints}\n"
    )
}

/// The Service's ports at a workload; `None`: it is no endpoint of it.
fn ports(snapshot: &Snapshot, name: &str, service: &str) -> Option<Vec<(u32, u32)>> {
    let resource = &snapshot.types[ADDRESS_TYPE_URL].resources.get(name)?;
    let Some(workload::address::Type::Workload(workload)) =
        workload::Address::decode(resource.value.as_slice()).expect("address").r#type
    else {
        panic!("no workload")
    };
    let ports = &workload.services.get(service)?.ports;
    Some(ports.iter().map(|port| (port.service_port, port.target_port)).collect())
}

fn pod(snapshot: &Snapshot, name: &str) -> Option<Vec<(u32, u32)>> {
    ports(snapshot, &format!("Kubernetes//Pod/{name}"), SERVICE)
}

#[test]
fn slices_say_who_is_an_endpoint_and_by_which_port() {
    let none = compiled(&[]);
    assert_eq!(
        (pod(&none, "shop/a"), pod(&none, "shop/b")),
        (None, None),
        "the selector says nothing here"
    );
    let one = compiled(&[&slice("s", "[{addresses: [10.0.0.1], targetRef: {kind: Pod, name: a}}]")]);
    assert_eq!(
        pod(&one, "shop/a"),
        Some(vec![(80, 8080), (90, 91)]),
        "the slice's port, not the Pod's"
    );
    assert_eq!(pod(&one, "shop/b"), None);
    let of_service = &one.types[ADDRESS_TYPE_URL].endpoints[SERVICE];
    assert_eq!(
        of_service,
        &["Kubernetes//Pod/shop/a"],
        "and who asks for the Service needs it"
    );
}

#[test]
fn several_slices_of_a_service_are_one_list() {
    // As a dual-stack Service has them.
    let six = slice("six", "[{addresses: ['fd00::1'], targetRef: {kind: Pod, name: a}}]").replace("IPv4", "IPv6");
    let four = slice(
        "four",
        "[{addresses: [10.0.0.1], targetRef: {kind: Pod, name: a}}, {addresses: [10.0.0.2]}]",
    );
    let snapshot = compiled(&[&six, &four]);
    assert_eq!(pod(&snapshot, "shop/a"), Some(vec![(80, 8080), (90, 91)]));
    assert_eq!(
        pod(&snapshot, "shop/b"),
        Some(vec![(80, 8080), (90, 91)]),
        "by its address alone"
    );
}

#[test]
fn what_is_not_ready_is_out_unless_the_pod_says_so_itself() {
    let listed = |conditions: &str| {
        let text = format!("[{{addresses: [10.0.0.1], conditions: {conditions}, targetRef: {{kind: Pod, name: a}}}}]");
        pod(&compiled(&[&slice("s", &text)]), "shop/a").is_some()
    };
    assert!(listed("{}") && listed("{ready: true}"), "unknown counts as ready");
    assert!(!listed("{ready: false}") && !listed("{ready: false, serving: true, terminating: true}"));
    // The Pod's own word is in its resource: nobody chooses it, and a Service that publishes what is not ready still finds it.
    let unready = PODS.replacen(
        "status: {podIPs: [{ip: 10.0.0.2}]}",
        "status: {podIPs: [{ip: 10.0.0.2}], conditions: [{type: Ready, status: 'False'}]}",
        1,
    );
    let text = [unready, slice("s", "[{addresses: [10.0.0.2], conditions: {ready: false}}]")].join("---\n");
    let listed = super::Listed::new(&world(&text)).pods.len();
    assert_eq!(listed, 1);
}

#[test]
fn an_endpoint_is_who_has_the_address() {
    for (endpoint, who) in [
        ("{addresses: [10.0.0.3]}", Some("other/elsewhere")),
        ("{addresses: [10.0.0.2], targetRef: {kind: Pod, name: a}}", None),
        ("{addresses: [10.0.0.9], targetRef: {kind: Pod, name: not-known-yet}}", None),
        (
            "{addresses: [192.0.2.1], targetRef: {kind: Pod, name: host}}",
            Some("shop/host"),
        ),
    ] {
        let snapshot = compiled(&[&slice("s", &format!("[{endpoint}]"))]);
        for name in ["shop/a", "shop/b", "other/elsewhere", "shop/host"] {
            assert_eq!(pod(&snapshot, name).is_some(), who == Some(name), "{endpoint}: {name}");
        }
    }
}

#[test]
fn an_endpoint_that_is_no_pod_is_a_workload_outside_of_the_mesh() {
    let name = "Kubernetes/discovery.k8s.io/EndpointSlice/shop/web/192.0.2.9";
    let snapshot = compiled(&[&slice("s", "[{addresses: [192.0.2.9]}]")]);
    assert_eq!(ports(&snapshot, name, SERVICE), Some(vec![(80, 8080), (90, 91)]));
    let resource = &snapshot.types[ADDRESS_TYPE_URL].resources[name];
    assert!(resource.aliases.is_empty(), "the address is not its own");
    assert!(
        snapshot.pods.keys().all(|key| key.starts_with("u-")),
        "nobody can prove anything of it"
    );
    let snapshot = compiled(&[&slice("s", "[{addresses: [192.0.2.9], conditions: {ready: false}}]")]);
    assert_eq!(ports(&snapshot, name, SERVICE), None);
}

#[test]
fn slices_of_nobody_and_of_names_are_left_alone() {
    let orphan = slice("s", "[{addresses: [10.0.0.1]}]").replace("service-name: web", "service-name: gone");
    let names = slice("t", "[{addresses: [example.com]}]").replace("IPv4", "FQDN");
    let external = PODS.replace("  selector: {app: web}\n", "  type: ExternalName\n");
    assert_eq!(pod(&compiled(&[&orphan, &names]), "shop/a"), None);
    let text = [external, slice("s", "[{addresses: [10.0.0.1]}]")].join("---\n");
    assert!(
        super::Listed::new(&world(&text)).pods.is_empty(),
        "another name for something outside"
    );
}

/// What the Service's resource says of how an endpoint is chosen: scopes that it must be in, health, seconds of affinity.
#[test]
fn a_service_says_how_its_endpoints_are_chosen() {
    let compiled = |spec: &str| {
        let service = format!("kind: Service\nmetadata: {{name: other, namespace: shop}}\nspec: {spec}\n");
        let snapshot = compiled(&[&service]);
        let resource = &snapshot.types[ADDRESS_TYPE_URL].resources["shop/other.shop.svc.cluster.local"];
        let Some(workload::address::Type::Service(service)) =
            workload::Address::decode(resource.value.as_slice()).expect("address").r#type
        else {
            panic!("no service")
        };
        let affinity = service.extensions.first().map(|extension| {
            assert_eq!(extension.name, mesh_proto::AFFINITY_EXTENSION);
            let config = extension.config.as_ref().expect("config");
            assert_eq!(config.type_url, mesh_proto::AFFINITY_TYPE_URL);
            let affinity = mesh_proto::mesh::SessionAffinity::decode(config.value.as_slice()).expect("affinity");
            affinity.timeout_seconds
        });
        (service.load_balancing, affinity)
    };
    assert_eq!(compiled("{}"), (None, None));
    // Followed by nobody here, and in nobody's way.
    assert_eq!(compiled("{trafficDistribution: PreferSameZone}"), (None, None));
    assert_eq!(
        compiled("{internalTrafficPolicy: Cluster, sessionAffinity: None}"),
        (None, None)
    );
    assert_eq!(compiled("{sessionAffinity: ClientIP}").1, Some(10_800));
    let given = "{sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 5}}}";
    assert_eq!(compiled(given).1, Some(5));
    let balancing = compiled("{internalTrafficPolicy: Local, publishNotReadyAddresses: true}").0;
    let balancing = balancing.expect("load balancing");
    assert_eq!(balancing.mode(), workload::load_balancing::Mode::Strict);
    let scopes: Vec<_> = balancing.routing_preference().collect();
    assert_eq!(scopes, [workload::load_balancing::Scope::Node]);
    assert_eq!(balancing.health_policy(), workload::load_balancing::HealthPolicy::AllowAll);
}

#[test]
fn an_affinity_that_is_no_time_is_refused() {
    let id = ObjectId {
        kind: Kind::Service,
        namespace: "shop".to_owned(),
        name: "web".to_owned(),
    };
    for seconds in [0, -1, 86_401] {
        let affinity = serde_json::json!({"clientIP": {"timeoutSeconds": seconds}});
        let spec = serde_json::json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": affinity});
        let error = convert::parse(&id, &serde_json::json!({"kind": "Service", "spec": spec})).expect_err("no time");
        assert!(
            error.starts_with("spec.sessionAffinityConfig.clientIP.timeoutSeconds:"),
            "{error}"
        );
    }
}

/// `internalTrafficPolicy: Local` asks for it.
#[test]
fn an_endpoint_that_is_no_pod_is_on_the_node_that_its_slice_names() {
    let endpoint = "[{addresses: [192.0.2.9], nodeName: node-2}, {addresses: [192.0.2.8]}]";
    let snapshot = compiled(&[&slice("s", endpoint)]);
    let node = |address: &str| {
        let name = format!("Kubernetes/discovery.k8s.io/EndpointSlice/shop/web/{address}");
        let resource = &snapshot.types[ADDRESS_TYPE_URL].resources[&name];
        match workload::Address::decode(resource.value.as_slice()).expect("address").r#type {
            Some(workload::address::Type::Workload(workload)) => workload.node,
            _ => panic!("no workload"),
        }
    };
    assert_eq!((node("192.0.2.9").as_str(), node("192.0.2.8").as_str()), ("node-2", ""));
}
