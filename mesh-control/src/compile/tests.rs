use mesh_proto::{mesh, security, workload};
use prost::Message as _;

use super::*;
use crate::capture_states::Proof;
use crate::objects::Labels;
use crate::registry::{Registry, Scan};

mod selection;

const CLUSTER: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {culvert.dev/mesh: enabled}}
---
apiVersion: v1
kind: Namespace
metadata: {name: outside}
---
apiVersion: v1
kind: Node
metadata: {name: node-a, labels: {topology.kubernetes.io/region: r, topology.kubernetes.io/zone: z}}
spec: {podCIDRs: [10.1.0.0/24, "fd00:1::/64"]}
---
apiVersion: v1
kind: Pod
metadata:
  name: web-abc-1
  namespace: shop
  uid: uid-web
  labels: {app: web, pod-template-hash: abc, version: v2}
  ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: web-abc, uid: u, controller: true}]
spec:
  nodeName: node-a
  serviceAccountName: web
  containers: [{name: c, ports: [{name: http, containerPort: 8080}]}]
status: {podIPs: [{ip: 10.1.0.5}, {ip: "fd00:1::5"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: opted-out, namespace: shop, uid: uid-out, labels: {culvert.dev/mesh: disabled}}
spec: {nodeName: node-b}
status: {podIPs: [{ip: 10.1.1.6}]}
---
apiVersion: v1
kind: Pod
metadata: {name: host, namespace: shop, uid: uid-host}
spec: {nodeName: node-a, hostNetwork: true}
status: {podIPs: [{ip: 192.168.0.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: stranger, namespace: outside, uid: uid-stranger, labels: {app: web}}
spec: {nodeName: node-a, serviceAccountName: stranger}
status: {podIPs: [{ip: 10.1.0.7}]}
---
apiVersion: v1
kind: Pod
metadata: {name: done, namespace: shop, uid: uid-done}
spec: {nodeName: node-a}
status: {phase: Succeeded, podIPs: [{ip: 10.1.0.9}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIPs: [10.96.0.10]
  selector: {app: web}
  ports: [{port: 80, targetPort: http}, {port: 81, targetPort: missing}, {port: 9000}]
---
apiVersion: culvert.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: everywhere, namespace: culvert-system}
spec: {action: Deny, rules: [{from: [{ipBlocks: [203.0.113.0/24]}]}]}
---
apiVersion: culvert.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: all, namespace: shop}
spec: {action: Allow, mode: DryRun, rules: [{}]}
---
apiVersion: culvert.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: web, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  action: Allow
  rules:
  - from: [{principals: [cluster.local/ns/a/sa/b], notNamespaces: ["*"]}, {namespaces: [c-*]}]
    to: [{ports: [8080]}]
"#;

fn world(texts: &[&str]) -> Arc<World> {
    let mut registry = Registry::default();
    let scan: Scan = texts
        .iter()
        .enumerate()
        .map(|(i, text)| (format!("{i}.yaml"), Ok(Arc::from(*text))))
        .collect();
    registry.apply(&scan);
    assert!(registry.rejections().is_empty(), "{:?}", registry.rejections());
    registry.world()
}

fn parameters() -> Parameters {
    Parameters {
        trust_domain: "cluster.local".into(),
        cluster: "Kubernetes".into(),
        pod_ranges: vec!["10.2.0.0/16".parse().expect("range")],
        trust_bundle: vec!["PEM".into()],
        revoked: BTreeSet::new(),
        endpoints: crate::compile::EndpointSource::Selectors,
    }
}

fn workload(snapshot: &Snapshot, name: &str) -> workload::Workload {
    let resource = &snapshot.types[ADDRESS_TYPE_URL].resources[name];
    match workload::Address::decode(resource.value.as_slice()).expect("address").r#type {
        Some(workload::address::Type::Workload(workload)) => workload,
        other => panic!("{other:?}"),
    }
}

fn capture(workload: &workload::Workload) -> Option<mesh::Capture> {
    let extension = workload
        .extensions
        .iter()
        .find(|extension| extension.name == mesh_proto::CAPTURE_EXTENSION)?;
    let config = extension.config.as_ref().expect("config");
    assert_eq!(config.type_url, mesh_proto::CAPTURE_TYPE_URL);
    Some(mesh::Capture::decode(config.value.as_slice()).expect("capture"))
}

#[test]
fn pods_become_workloads() {
    let snapshot = compile(&world(&[CLUSTER]), &CaptureStates::default(), &parameters());
    let web = workload(&snapshot, "Kubernetes//Pod/shop/web-abc-1");
    assert_eq!(web.uid, "Kubernetes//Pod/shop/web-abc-1");
    assert_eq!(web.addresses[0], [10, 1, 0, 5]);
    assert_eq!(web.addresses[1].len(), 16);
    assert_eq!(
        (web.node.as_str(), web.service_account.as_str(), web.trust_domain.as_str()),
        ("node-a", "web", "cluster.local")
    );
    assert_eq!(
        (web.workload_name.as_str(), web.workload_type()),
        ("web", workload::WorkloadType::Deployment)
    );
    assert_eq!((web.canonical_name.as_str(), web.canonical_revision.as_str()), ("web", "v2"));
    assert_eq!(
        web.locality.as_ref().map(|at| (at.region.as_str(), at.zone.as_str())),
        Some(("r", "z"))
    );
    assert_eq!(web.authorization_policies, ["shop/web"]);
    let ports = &web.services["shop/web.shop.svc.cluster.local"].ports;
    let ports: Vec<_> = ports.iter().map(|port| (port.service_port, port.target_port)).collect();
    assert_eq!(
        ports,
        [(80, 8080), (9000, 9000)],
        "a port that the Pod does not name is left out"
    );
    assert_eq!(web.tunnel_protocol(), workload::TunnelProtocol::None);
    let state = capture(&web).expect("belongs in the mesh");
    assert_eq!(
        (state.state(), state.pod_uid.as_str()),
        (mesh::capture::State::Pending, "uid-web")
    );

    for outsider in ["shop/opted-out", "shop/host", "outside/stranger"] {
        let outsider = workload(&snapshot, &format!("Kubernetes//Pod/{outsider}"));
        assert_eq!(capture(&outsider), None, "{}", outsider.name);
        assert!(outsider.services.is_empty(), "a Service selects in its own namespace");
        let expected = if outsider.name == "host" {
            workload::NetworkMode::HostNetwork
        } else {
            workload::NetworkMode::Standard
        };
        assert_eq!(outsider.network_mode(), expected, "agents know it by no address");
    }
    let addresses = &snapshot.types[ADDRESS_TYPE_URL];
    assert!(!addresses.resources.contains_key("Kubernetes//Pod/shop/done"));
    assert_eq!(addresses.aliases["/10.1.0.5"], "Kubernetes//Pod/shop/web-abc-1");
    assert_eq!(addresses.aliases["/fd00:1::5"], "Kubernetes//Pod/shop/web-abc-1");
    assert_eq!(addresses.aliases["/10.96.0.10"], "shop/web.shop.svc.cluster.local");
    assert!(
        !addresses.aliases.contains_key("/192.168.0.1"),
        "several Pods share a host's address"
    );
}

#[test]
fn a_pod_that_another_makers_proxy_captures_is_tunnelled_to() {
    let annotated = |value: &str| {
        let annotation = format!("  uid: uid-web\n  annotations: {{ambient.istio.io/redirection: {value}}}\n");
        let world = world(&[&CLUSTER.replace("  uid: uid-web\n", &annotation)]);
        let mut captures = CaptureStates::default();
        let of = |captures: &CaptureStates| {
            let web = workload(&compile(&world, captures, &parameters()), "Kubernetes//Pod/shop/web-abc-1");
            let capture = capture(&web).expect("member");
            (capture.state(), capture.pod_uid)
        };
        let said = of(&captures);
        captures.apply("uid-web", Proof::Lost);
        (said, of(&captures))
    };
    use mesh::capture::State;
    let (proven, pending) = ((State::Proven, String::new()), (State::Pending, "uid-web".to_owned()));
    let lost = (State::Lost, "uid-web".to_owned());
    assert_eq!(
        annotated("enabled"),
        (proven, lost.clone()),
        "our own agent's word counts more"
    );
    assert_eq!(annotated("disabled"), (pending, lost));
}

#[test]
fn only_proven_pods_are_tunnelled_to() {
    let world = world(&[CLUSTER]);
    let mut captures = CaptureStates::default();
    for (proof, state, tunnel) in [
        (Proof::Proven, mesh::capture::State::Proven, workload::TunnelProtocol::Hbone),
        (Proof::Lost, mesh::capture::State::Lost, workload::TunnelProtocol::None),
    ] {
        captures.apply("uid-web", proof);
        captures.apply("uid-stranger", proof);
        let snapshot = compile(&world, &captures, &parameters());
        let web = workload(&snapshot, "Kubernetes//Pod/shop/web-abc-1");
        assert_eq!(
            (capture(&web).expect("member").state(), web.tunnel_protocol()),
            (state, tunnel)
        );
        let stranger = workload(&snapshot, "Kubernetes//Pod/outside/stranger");
        assert_eq!(
            (capture(&stranger), stranger.tunnel_protocol()),
            (None, workload::TunnelProtocol::None)
        );
    }
}

#[test]
fn nodes_get_the_identities_of_their_members_only() {
    let snapshot = compile(&world(&[CLUSTER]), &CaptureStates::default(), &parameters());
    let of = |node: &str| {
        snapshot
            .identities
            .get(node)
            .map(|set| set.iter().cloned().collect::<Vec<_>>())
    };
    assert_eq!(of("node-a").expect("node-a"), ["spiffe://cluster.local/ns/shop/sa/web"]);
    assert_eq!(of("node-b"), None);
}

/// A CNI plugin waits for the certificate before the Pod has its network.
#[test]
fn a_pod_that_is_scheduled_gives_its_node_its_identity_before_it_has_an_address() {
    const SCHEDULED: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: new, namespace: shop, uid: uid-new}\n\
                             spec: {nodeName: node-c, serviceAccountName: new}\nstatus: {phase: Pending}\n";
    const UNSCHEDULED: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: newer, namespace: shop, uid: uid-newer}\n\
                               spec: {serviceAccountName: newer}\nstatus: {phase: Pending}\n";
    let world = world(&[CLUSTER, SCHEDULED, UNSCHEDULED]);
    let snapshot = compile(&world, &CaptureStates::default(), &parameters());
    let of_new = snapshot.identities["node-c"].iter().collect::<Vec<_>>();
    assert_eq!(of_new, ["spiffe://cluster.local/ns/shop/sa/new"]);
    let all: Vec<&String> = snapshot.identities.values().flatten().collect();
    assert!(!all.iter().any(|identity| identity.ends_with("/newer")), "{all:?}");
}

#[test]
fn policies_become_authorizations() {
    let snapshot = compile(&world(&[CLUSTER]), &CaptureStates::default(), &parameters());
    let of = |name: &str| {
        let resource = &snapshot.types[AUTHORIZATION_TYPE_URL].resources[name];
        security::Authorization::decode(resource.value.as_slice()).expect("authorization")
    };
    let everywhere = of("culvert-system/everywhere");
    assert_eq!(
        (everywhere.scope(), everywhere.action()),
        (security::Scope::Global, security::Action::Deny)
    );
    let block = &everywhere.rules[0].clauses[0].matches[0].source_ips[0];
    assert_eq!((block.address.as_slice(), block.length), ([203, 0, 113, 0].as_slice(), 24));
    let all = of("shop/all");
    assert_eq!((all.scope(), all.dry_run), (security::Scope::Namespace, true));
    assert_eq!(
        all.rules[0].clauses,
        [security::Clause { matches: vec![] }],
        "an empty clause is true"
    );
    let web = of("shop/web");
    assert_eq!(web.scope(), security::Scope::WorkloadSelector);
    let [from, to] = web.rules[0].clauses.as_slice() else {
        panic!("{web:?}")
    };
    assert_eq!(from.matches.len(), 2);
    use security::string_match::MatchType;
    let kind = |values: &[security::StringMatch]| values[0].match_type.clone();
    assert_eq!(
        kind(&from.matches[0].principals),
        Some(MatchType::Exact("cluster.local/ns/a/sa/b".into()))
    );
    assert_eq!(
        kind(&from.matches[0].not_namespaces),
        Some(MatchType::Presence(security::Empty {}))
    );
    assert_eq!(kind(&from.matches[1].namespaces), Some(MatchType::Prefix("c-".into())));
    assert_eq!(to.matches[0].destination_ports, [8080]);
}

#[test]
fn settings_carry_ranges_and_roots() {
    let snapshot = compile(&world(&[CLUSTER]), &CaptureStates::default(), &parameters());
    let resource = &snapshot.types[SETTINGS_TYPE_URL].resources[SETTINGS_NAME];
    let settings = mesh::Settings::decode(resource.value.as_slice()).expect("settings");
    let ranges: Vec<_> = settings
        .pod_ranges
        .iter()
        .map(|range| (range.address.len(), range.length))
        .collect();
    assert_eq!(ranges, [(4, 24), (4, 16), (16, 64)]);
    assert_eq!(
        (settings.trust_domain.as_str(), settings.trust_bundle),
        ("cluster.local", vec!["PEM".to_owned()])
    );
}

#[test]
fn mesh_configs_go_into_the_settings() {
    use mesh::settings::Mtls;
    let settings = |texts: &[&str]| {
        let snapshot = compile(&world(texts), &CaptureStates::default(), &parameters());
        let resource = &snapshot.types[SETTINGS_TYPE_URL].resources[SETTINGS_NAME];
        mesh::Settings::decode(resource.value.as_slice()).expect("settings")
    };
    let without = settings(&[CLUSTER]);
    assert_eq!(without.mtls(), Mtls::Permissive);
    assert!(without.namespaces.is_empty() && without.excluded_ports.is_empty() && without.excluded_cidrs.is_empty());
    let config = |namespace: &str, spec: &str| {
        format!(
            "apiVersion: culvert.dev/v1alpha1\nkind: MeshConfig\nmetadata: {{name: default, namespace: {namespace}}}\nspec: {spec}\n"
        )
    };
    let given = settings(&[
        CLUSTER,
        &config("shop", "{mtls: Permissive}"),
        &config("bank", "{mtls: Strict}"),
        &config(
            "culvert-system",
            "{mtls: Strict, excludedPorts: [9100, 22], excludedCidrs: [169.254.0.0/16]}",
        ),
    ]);
    assert_eq!(given.mtls(), Mtls::Strict);
    let namespaces: Vec<_> = given.namespaces.iter().map(|of| (of.namespace.as_str(), of.mtls())).collect();
    assert_eq!(namespaces, [("bank", Mtls::Strict), ("shop", Mtls::Permissive)]);
    assert_eq!(given.excluded_ports, [22, 9100]);
    assert_eq!(
        (given.excluded_cidrs[0].address.as_slice(), given.excluded_cidrs[0].length),
        ([169, 254, 0, 0].as_slice(), 16)
    );
}

#[test]
fn the_order_of_documents_changes_nothing() {
    let mut documents: Vec<&str> = CLUSTER.split("---\n").collect();
    let reference = compile(&world(&[CLUSTER]), &CaptureStates::default(), &parameters());
    for turn in 0..documents.len() {
        documents.rotate_left(1);
        if turn % 2 == 0 {
            documents.reverse();
        }
        let other = compile(&world(&documents), &CaptureStates::default(), &parameters());
        for (url, of_type) in &reference.types {
            assert_eq!(of_type.version, other.types[url].version, "{url}");
            assert_eq!(of_type.resources, other.types[url].resources, "{url}");
        }
    }
}

#[test]
fn a_version_changes_only_with_its_resource() {
    let before = compile(&world(&[CLUSTER]), &CaptureStates::default(), &parameters());
    let after = compile(
        &world(&[&CLUSTER.replace("ports: [8080]", "ports: [8081]")]),
        &CaptureStates::default(),
        &parameters(),
    );
    let version = |snapshot: &Snapshot, name: &str| snapshot.types[AUTHORIZATION_TYPE_URL].resources[name].version.clone();
    assert_ne!(version(&before, "shop/web"), version(&after, "shop/web"));
    assert_eq!(version(&before, "shop/all"), version(&after, "shop/all"));
    assert_eq!(before.types[ADDRESS_TYPE_URL].version, after.types[ADDRESS_TYPE_URL].version);
}

#[test]
fn names_of_owners() {
    let pod = |kind: &str, name: &str, hash: Option<&str>| Pod {
        owner: Some((kind.into(), name.into())),
        labels: hash
            .map(|hash| ("pod-template-hash".to_owned(), hash.to_owned()))
            .into_iter()
            .collect(),
        ..Pod::default()
    };
    for (kind, name, hash, expected) in [
        ("ReplicaSet", "web-abc", Some("abc"), (OwnerKind::Deployment, "web")),
        ("ReplicaSet", "web-abc", None, (OwnerKind::Deployment, "web-abc")),
        ("Job", "backup-29876543", None, (OwnerKind::CronJob, "backup")),
        ("Job", "import-1", None, (OwnerKind::Job, "import-1")),
        ("StatefulSet", "db", None, (OwnerKind::Pod, "db")),
    ] {
        let owner = workload_names::owner("pod", &pod(kind, name, hash));
        assert_eq!((owner.kind, owner.name.as_str()), expected);
    }
    assert_eq!(workload_names::owner("pod", &Pod::default()).name, "pod");
}

#[test]
fn a_large_mesh_compiles_to_everything_in_it() {
    let mut objects = World::new();
    let id = |kind, namespace: usize, name: String| ObjectId {
        kind,
        namespace: format!("n{namespace}"),
        name,
    };
    let labels = |i: usize| Labels::from([("app".to_owned(), format!("a{i}"))]);
    let (pods, services, policies, namespaces) = (10_000, 1000, 500, 50);
    for i in 0..pods {
        let pod = Pod {
            uid: format!("uid-{i}"),
            labels: labels(i % services),
            addresses: vec![std::net::Ipv4Addr::from(0x0a00_0000 + i as u32).into()],
            node: format!("node-{}", i % 100),
            service_account: "default".into(),
            ready: true,
            ..Pod::default()
        };
        objects.insert(
            id(Kind::Pod, i % namespaces, format!("p{i}")),
            Arc::new(Object::Pod(Box::new(pod))),
        );
    }
    for i in 0..services {
        let service = Service {
            selector: labels(i),
            ..Service::default()
        };
        objects.insert(
            id(Kind::Service, i % namespaces, format!("s{i}")),
            Arc::new(Object::Service(service)),
        );
    }
    for i in 0..policies {
        let policy = mesh_api::ValidPolicy {
            selector: Some(labels(i)),
            action: mesh_api::PolicyAction::Allow,
            rules: vec![],
            mode: mesh_api::Mode::Enforce,
        };
        let policy = Object::AuthorizationPolicy(Box::new(policy));
        objects.insert(
            id(Kind::AuthorizationPolicy, i % namespaces, format!("a{i}")),
            Arc::new(policy),
        );
    }
    let began = std::time::Instant::now();
    let snapshot = compile(&objects, &CaptureStates::default(), &parameters());
    // For who measures; nothing is asserted of it.
    eprintln!("compiled in {:?}", began.elapsed());
    assert_eq!(snapshot.types[ADDRESS_TYPE_URL].resources.len(), pods + services);
    assert_eq!(snapshot.types[AUTHORIZATION_TYPE_URL].resources.len(), policies);
    let one = workload(&snapshot, "Kubernetes//Pod/n7/p57");
    assert_eq!(
        (one.services.len(), one.authorization_policies.as_slice()),
        (1, ["n7/a57".to_owned()].as_slice())
    );
}

mod step_by_step {
    use proptest::prelude::*;

    use super::*;

    fn pod() -> impl Strategy<Value = Object> {
        (any::<bool>(), 0..3_u8, 0..3_u8, any::<bool>(), any::<bool>()).prop_map(|(ready, app, address, finished, known)| {
            Object::Pod(Box::new(Pod {
                uid: if known { format!("uid-{app}") } else { String::new() },
                labels: [("app".to_owned(), format!("a{app}"))].into(),
                addresses: vec![[10, 1, 0, address].into()],
                node: "node-a".into(),
                service_account: "web".into(),
                ready,
                finished,
                ..Pod::default()
            }))
        })
    }

    fn service() -> impl Strategy<Value = Object> {
        (0..3_u8, 1..3_u16).prop_map(|(app, port)| {
            Object::Service(Service {
                addresses: vec![[10, 2, 0, app].into()],
                ports: vec![crate::objects::ServicePort {
                    name: String::new(),
                    port,
                    target: TargetPort::Number(8080),
                }],
                selector: [("app".to_owned(), format!("a{app}"))].into(),
                ..Service::default()
            })
        })
    }

    fn namespace() -> impl Strategy<Value = Object> {
        any::<bool>().prop_map(|enabled| Object::Namespace {
            labels: [(MESH_LABEL.to_owned(), if enabled { "enabled" } else { "no" }.to_owned())].into(),
            best_effort: false,
        })
    }

    /// An object of few, or that it is gone.
    fn change() -> impl Strategy<Value = (ObjectId, Option<Object>)> {
        let id = |kind: Kind, namespace: &str, name: String| ObjectId {
            kind,
            namespace: namespace.to_owned(),
            name,
        };
        prop_oneof![
            (0..4_u8, proptest::option::weighted(0.8, pod()))
                .prop_map(move |(n, pod)| (id(Kind::Pod, "shop", format!("p{n}")), pod)),
            (0..3_u8, proptest::option::weighted(0.8, service()))
                .prop_map(move |(n, service)| (id(Kind::Service, "shop", format!("s{n}")), service)),
            proptest::option::weighted(0.8, namespace())
                .prop_map(move |namespace| (id(Kind::Namespace, "", "shop".to_owned()), namespace)),
        ]
    }

    proptest! {
        #[test]
        fn is_the_same_as_at_once(changes in proptest::collection::vec(change(), 1..24)) {
            let (mut world, captures) = (World::new(), CaptureStates::default());
            let mut before = Snapshot::default();
            for (id, object) in changes {
                match object {
                    Some(object) => drop(world.insert(id, Arc::new(object))),
                    None => drop(world.remove(&id)),
                }
                let whole = compile(&world, &captures, &parameters());
                let after = compile_after(&world, &captures, &parameters(), &before);
                for (url, of_type) in &whole.types {
                    let same = &after.types[url];
                    prop_assert_eq!(&of_type.version, &same.version);
                    prop_assert_eq!(&of_type.resources, &same.resources);
                    prop_assert_eq!(&of_type.aliases, &same.aliases);
                    prop_assert_eq!(&of_type.endpoints, &same.endpoints);
                }
                prop_assert_eq!(&whole.identities, &after.identities);
                prop_assert_eq!(&whole.pods, &after.pods);
                prop_assert_eq!(&whole.enrolment, &after.enrolment);
                before = after;
            }
        }
    }

    #[test]
    fn takes_over_what_is_the_same() {
        let before = compile(&world(&[CLUSTER]), &CaptureStates::default(), &parameters());
        let changed = world(&[&CLUSTER.replace("ports: [8080]", "ports: [8081]")]);
        let after = compile_after(&changed, &CaptureStates::default(), &parameters(), &before);
        let is_taken_over =
            |url: &str, name: &str| Arc::ptr_eq(&before.types[url].resources[name], &after.types[url].resources[name]);
        assert!(is_taken_over(AUTHORIZATION_TYPE_URL, "shop/all"));
        assert!(!is_taken_over(AUTHORIZATION_TYPE_URL, "shop/web"));
        assert!(is_taken_over(ADDRESS_TYPE_URL, "Kubernetes//Pod/shop/web-abc-1"));
    }
}
