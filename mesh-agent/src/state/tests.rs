use std::time::Duration;

use super::*;
use crate::identity::Identity;
use crate::policy::{Action, Rule};
use crate::workload::{ServicePort, WorkloadType};

fn workload(name: &str, ip: &str, membership: Membership) -> Workload {
    Workload {
        uid: format!("Kubernetes//Pod/shop/{name}").into(),
        name: name.into(),
        namespace: "shop".into(),
        identity: Identity::new("cluster.local", "shop", name),
        addresses: vec![ip.parse().unwrap()],
        host_network: false,
        node: "".into(),
        workload_type: WorkloadType::Pod,
        workload_name: name.into(),
        canonical_name: name.into(),
        canonical_revision: "".into(),
        cluster: "Kubernetes".into(),
        region: "".into(),
        zone: "".into(),
        membership,
        pod_uid: format!("uid-{name}").into(),
        policies: vec![],
        services: vec![],
        healthy: true,
        weight: 1,
    }
}

fn policy(name: &str, namespace: &str, scope: Scope) -> Change {
    Change::Policy(Arc::new(Policy {
        name: name.into(),
        namespace: namespace.into(),
        scope,
        action: Action::Allow,
        rules: vec![Rule::default()],
        dry_run: false,
    }))
}

fn to(text: &str) -> OriginalDst {
    OriginalDst::new(text.parse().unwrap())
}

#[test]
fn what_stands_at_a_destination() {
    let mut state = State::default();
    assert_eq!(
        state.destination(to("8.8.8.8:53")),
        Destination::Unknown,
        "nothing was told yet"
    );
    state.apply(vec![
        Change::Synced,
        Change::Settings(Settings {
            pod_ranges: vec!["10.0.0.0/16".parse().unwrap(), "fd00::/64".parse().unwrap()],
            ..Settings::default()
        }),
        Change::Workload(workload("proven", "10.0.0.1", Membership::Proven)),
        Change::Workload(workload("pending", "10.0.0.2", Membership::Pending)),
        Change::Workload(workload("lost", "fd00::3", Membership::Lost)),
        Change::Workload(workload("outside", "10.0.0.4", Membership::Outside)),
        Change::Service(Service {
            name: "web".into(),
            namespace: "shop".into(),
            hostname: "web.shop.svc.cluster.local".into(),
            addresses: vec!["10.96.0.1".parse().unwrap()],
            ports: vec![ServicePort { port: 80, target: 8080 }],
            only_healthy: true,
            node_local: false,
            affinity: None,
        }),
    ]);
    assert!(matches!(state.destination(to("10.0.0.1:80")), Destination::Mesh(w) if &*w.name == "proven"));
    assert!(
        matches!(state.destination(to("[::ffff:10.0.0.1]:80")), Destination::Mesh(_)),
        "v4-mapped"
    );
    assert!(matches!(state.destination(to("10.0.0.2:80")), Destination::Pending(_)));
    assert!(matches!(state.destination(to("[fd00::3]:80")), Destination::Lost(_)));
    assert!(matches!(state.destination(to("10.0.0.4:80")), Destination::Outside(Some(_))));
    assert!(matches!(state.destination(to("10.96.0.1:80")), Destination::ServiceVip(_)));
    assert_eq!(state.destination(to("10.0.7.7:80")), Destination::Unknown);
    assert_eq!(state.destination(to("[fd00::9]:80")), Destination::Unknown);
    assert_eq!(state.destination(to("8.8.8.8:53")), Destination::Outside(None));

    state.apply(vec![
        Change::RemoveAddress("shop/web.shop.svc.cluster.local".into()),
        Change::RemoveAddress("Kubernetes//Pod/shop/proven".into()),
    ]);
    assert_eq!(state.destination(to("10.96.0.1:80")), Destination::Outside(None));
    assert_eq!(state.destination(to("10.0.0.1:80")), Destination::Unknown);
}

#[test]
fn an_address_that_is_given_to_the_next_pod() {
    let ip: IpAddr = "10.0.0.1".parse().unwrap();
    let mut state = State::default();
    state.apply(vec![
        Change::Workload(workload("old", "10.0.0.1", Membership::Proven)),
        Change::Workload(workload("new", "10.0.0.1", Membership::Pending)),
    ]);
    assert_eq!(&*state.by_address(ip).unwrap().name, "new");
    assert_eq!(&*state.pod_at(ip, "shop", "old").unwrap().name, "old");
    state.apply(vec![Change::RemoveAddress("Kubernetes//Pod/shop/old".into())]);
    assert_eq!(&*state.by_address(ip).unwrap().name, "new");
    assert!(state.pod_at(ip, "shop", "old").is_none());
    // A Pod that moves leaves its address.
    state.apply(vec![Change::Workload(workload("new", "10.0.0.2", Membership::Proven))]);
    assert!(state.by_address(ip).is_none());
}

#[test]
fn a_pod_on_the_hosts_network_has_no_address_of_its_own() {
    let ip: IpAddr = "10.0.0.1".parse().unwrap();
    let on_host = |name| Workload {
        host_network: true,
        ..workload(name, "10.0.0.1", Membership::Outside)
    };
    let mut state = State::default();
    state.apply(vec![
        Change::Settings(Settings {
            pod_ranges: vec!["10.0.0.0/16".parse().unwrap()],
            ..Settings::default()
        }),
        Change::Synced,
        Change::Workload(workload("victim", "10.0.0.1", Membership::Proven)),
        Change::Workload(on_host("shadow")),
    ]);
    assert!(
        matches!(state.destination(to("10.0.0.1:80")), Destination::Mesh(w) if &*w.name == "victim"),
        "never in clear"
    );
    assert!(state.pod_at(ip, "shop", "shadow").is_none());
    assert!(state.by_uid("Kubernetes//Pod/shop/shadow").is_some());
    // Neither when it is the only one, nor when a Pod moves onto the host's network.
    state.apply(vec![Change::Workload(on_host("victim"))]);
    assert_eq!(state.destination(to("10.0.0.1:80")), Destination::Unknown);
}

#[test]
fn what_is_excluded_is_not_the_meshs_whatever_stands_there() {
    let settings = Settings {
        pod_ranges: vec!["10.0.0.0/16".parse().unwrap()],
        excluded: Exclusions {
            ports: [22].into(),
            ranges: vec!["10.0.1.0/24".parse().unwrap(), "fd00::/64".parse().unwrap()],
        },
        ..Settings::default()
    };
    let mut state = State::default();
    state.apply(vec![
        Change::Synced,
        Change::Settings(settings),
        Change::Workload(workload("proven", "10.0.0.1", Membership::Proven)),
        Change::Workload(workload("lost", "10.0.1.1", Membership::Lost)),
    ]);
    let name = |text: &str| match state.destination(to(text)) {
        Destination::Excluded(workload) => workload.map_or("nobody".to_owned(), |workload| workload.name.to_string()),
        standing => format!("{standing:?}").split('(').next().unwrap().to_owned(),
    };
    for (destination, expected) in [
        ("10.0.0.1:22", "proven"),
        ("[::ffff:10.0.0.1]:22", "proven"),
        ("10.0.0.1:23", "Mesh"),
        ("10.0.1.1:80", "lost"),
        ("[fd00::1]:80", "nobody"),
        ("10.0.0.9:22", "nobody"),
        ("10.0.0.9:80", "Unknown"),
        ("8.8.8.8:22", "nobody"),
        ("10.0.1.1:15008", "Lost"),
    ] {
        assert_eq!(name(destination), expected, "{destination}");
    }
}

/// As the kernel reads prefixes.
fn is_in_mesh(prefixes: &[(ipnet::IpNet, bool)], ip: &str) -> bool {
    let ip: IpAddr = ip.parse().unwrap();
    let everything = |prefix: &ipnet::IpNet| prefix.prefix_len() == 0;
    prefixes
        .iter()
        .filter(|(prefix, _)| prefix.contains(&ip) || everything(prefix))
        .max_by_key(|(prefix, _)| prefix.prefix_len())
        .is_some_and(|(_, is_in)| *is_in)
}

#[test]
fn what_is_in_the_mesh_by_address_alone() {
    let mut state = State::default();
    let everywhere = ["10.0.0.1", "8.8.8.8", "2001:db8::1"];
    assert!(
        everywhere.iter().all(|ip| is_in_mesh(&state.prefixes(), ip)),
        "before all is told"
    );
    state.apply(vec![
        Change::Synced,
        Change::Settings(Settings {
            pod_ranges: vec![
                "10.0.0.0/16".parse().unwrap(),
                "10.7.1.0/24".parse().unwrap(),
                "fd00::/64".parse().unwrap(),
            ],
            excluded: Exclusions {
                ports: [22].into(),
                ranges: vec!["10.0.1.0/24".parse().unwrap(), "10.7.0.0/16".parse().unwrap()],
            },
            ..Settings::default()
        }),
        Change::Workload(workload("inside", "10.0.0.1", Membership::Proven)),
        Change::Workload(workload("elsewhere", "192.0.2.1", Membership::Pending)),
        Change::Workload(workload("lost", "2001:db8::1", Membership::Lost)),
        Change::Workload(workload("outsider", "192.0.2.2", Membership::Outside)),
        Change::Workload(workload("excluded", "10.7.0.1", Membership::Proven)),
        Change::Service(Service {
            name: "web".into(),
            namespace: "shop".into(),
            hostname: "web.shop.svc.cluster.local".into(),
            addresses: vec!["10.96.0.1".parse().unwrap()],
            ports: Vec::new(),
            only_healthy: true,
            node_local: false,
            affinity: None,
        }),
    ]);
    let prefixes = state.prefixes();
    for (ip, expected) in [
        ("10.0.0.1", true),
        ("10.0.9.9", true),
        ("fd00::9", true),
        ("192.0.2.1", true),
        ("2001:db8::1", true),
        ("10.96.0.1", true),
        ("192.0.2.2", false),
        ("2001:db8::2", false),
        ("10.96.0.2", false),
        ("8.8.8.8", false),
        // Excluded: of a Pod range, a Pod range itself, a member.
        ("10.0.1.1", false),
        ("10.7.1.1", false),
        ("10.7.0.1", false),
    ] {
        assert_eq!(is_in_mesh(&prefixes, ip), expected, "{ip}");
    }
    // Addresses in a range need no place of their own.
    assert_eq!(prefixes.len(), 2 + 2 + 3, "{prefixes:?}");
}

#[test]
fn strict_by_mesh_and_namespace() {
    let mut settings = Settings {
        namespaces: [("legacy".into(), Mtls::Permissive), ("bank".into(), Mtls::Strict)].into(),
        excluded: Exclusions {
            ports: [22].into(),
            ranges: vec!["10.0.1.0/24".parse().unwrap()],
        },
        ..Settings::default()
    };
    let (here, excluded): (IpAddr, IpAddr) = ("10.0.0.1".parse().unwrap(), "10.0.1.1".parse().unwrap());
    let refuses =
        |settings: &Settings| ["shop", "legacy", "bank"].map(|namespace| settings.refuses_plaintext(namespace, here, 80));
    assert_eq!(refuses(&settings), [false, false, true]);
    settings.mtls = Mtls::Strict;
    assert_eq!(refuses(&settings), [true, false, true]);
    assert!(!settings.refuses_plaintext("shop", here, 22));
    assert!(!settings.refuses_plaintext("shop", excluded, 80));
}

#[test]
fn an_endpoint_that_is_not_proven_is_none_where_strict_holds() {
    let port = ServicePort { port: 80, target: 8080 };
    let service = Service {
        name: "web".into(),
        namespace: "shop".into(),
        hostname: "web.shop.svc".into(),
        addresses: vec!["10.96.0.1".parse().unwrap()],
        ports: vec![port],
        only_healthy: true,
        node_local: false,
        affinity: None,
    };
    let of = |name: &str, ip: &str, membership| Workload {
        services: vec![("shop/web.shop.svc".into(), vec![port])],
        ..workload(name, ip, membership)
    };
    let mut state = State::default();
    state.apply(vec![
        Change::Synced,
        Change::Service(service.clone()),
        Change::Workload(of("proven", "10.0.0.1", Membership::Proven)),
        Change::Workload(of("pending", "10.0.0.2", Membership::Pending)),
    ]);
    let count = |state: &State| match state.endpoints(&service, to("10.96.0.1:80")) {
        Endpoints::Of(endpoints) => endpoints.len(),
        Endpoints::NoSuchPort => panic!("its port is known"),
    };
    assert_eq!(count(&state), 2);
    state.apply(vec![Change::Settings(Settings {
        mtls: Mtls::Strict,
        ..Settings::default()
    })]);
    assert_eq!(count(&state), 1);
}

#[test]
fn policies_by_scope() {
    let mut web = workload("web", "10.0.0.1", Membership::Proven);
    web.policies = vec!["shop/selected".into()];
    let mut state = State::default();
    state.apply(vec![
        policy("root/all", "root", Scope::Global),
        policy("shop/here", "shop", Scope::Namespace),
        policy("bank/there", "bank", Scope::Namespace),
        policy("shop/others", "shop", Scope::WorkloadSelector),
    ]);
    let names = |applicable: &ApplicablePolicies| applicable.policies.iter().map(|p| p.name.to_string()).collect::<Vec<_>>();
    let applicable = state.policies_for(&web);
    assert_eq!(names(&applicable), ["root/all", "shop/here"]);
    assert!(!applicable.complete, "shop/selected is missing");

    state.apply(vec![policy("shop/selected", "shop", Scope::WorkloadSelector)]);
    let applicable = state.policies_for(&web);
    assert_eq!(names(&applicable), ["root/all", "shop/here", "shop/selected"]);
    assert!(!applicable.complete, "more may come");
    state.apply(vec![Change::Synced]);
    assert!(state.policies_for(&web).complete);

    state.apply(vec![Change::RemovePolicy("root/all".into())]);
    assert_eq!(names(&state.policies_for(&web)), ["shop/here", "shop/selected"]);
}

#[test]
fn an_endpoint_has_its_address() {
    let port = ServicePort { port: 80, target: 8080 };
    let service = Service {
        name: "web".into(),
        namespace: "shop".into(),
        hostname: "web.shop.svc".into(),
        addresses: vec!["10.96.0.1".parse().unwrap()],
        ports: vec![port],
        only_healthy: true,
        node_local: false,
        affinity: None,
    };
    let of = |name: &str, ip: &str, host_network| Workload {
        host_network,
        services: vec![("shop/web.shop.svc".into(), vec![port])],
        ..workload(name, ip, Membership::Outside)
    };
    let mut state = State::default();
    state.apply(vec![
        Change::Synced,
        Change::Settings(Settings {
            pod_ranges: vec!["10.0.0.0/16".parse().unwrap()],
            ..Settings::default()
        }),
        Change::Service(service.clone()),
        Change::Workload(of("on-its-host", "192.0.2.1", true)),
        // At addresses that are others', or will be.
        Change::Workload(of("shadow", "10.0.0.1", true)),
        Change::Workload(of("early-shadow", "10.0.0.2", true)),
        Change::Workload(of("before", "10.0.0.3", false)),
        Change::Workload(workload("victim", "10.0.0.1", Membership::Proven)),
        Change::Workload(workload("after", "10.0.0.3", Membership::Proven)),
    ]);
    let Endpoints::Of(endpoints) = state.endpoints(&service, to("10.96.0.1:80")) else {
        panic!("its port is known");
    };
    let addresses: Vec<_> = endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect();
    assert_eq!(addresses, ["192.0.2.1:8080"]);
}

#[test]
fn endpoints_of_a_service() {
    let port = |port, target| ServicePort { port, target };
    let service = Service {
        name: "web".into(),
        namespace: "shop".into(),
        hostname: "web.shop.svc".into(),
        addresses: vec!["10.96.0.1".parse().unwrap(), "fd96::1".parse().unwrap()],
        ports: vec![port(80, 8080), port(81, 8081)],
        only_healthy: true,
        node_local: false,
        affinity: None,
    };
    let of = |name: &str, addresses: &[&str], target| Workload {
        addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
        services: vec![("shop/web.shop.svc".into(), vec![port(80, target)])],
        ..workload(name, "10.0.0.1", Membership::Proven)
    };
    let mut state = State::default();
    // Workloads may be told before their service.
    state.apply(vec![
        Change::Workload(of("dual", &["10.0.0.1", "fd00::1"], 8080)),
        Change::Workload(of("six", &["fd00::2"], 8080)),
        Change::Workload(of("own-port", &["10.0.0.3"], 9090)),
        Change::Workload(Workload {
            membership: Membership::Lost,
            ..of("lost", &["10.0.0.4"], 8080)
        }),
        Change::Workload(Workload {
            weight: 0,
            ..of("drained", &["10.0.0.5"], 8080)
        }),
        Change::Workload(Workload {
            healthy: false,
            ..of("unready", &["10.0.0.6"], 8080)
        }),
        Change::Workload(workload("other", "10.0.0.7", Membership::Proven)),
        Change::Service(service.clone()),
    ]);
    let endpoints = |state: &State, service: &Service, asked: &str| match state.endpoints(service, to(asked)) {
        Endpoints::NoSuchPort => vec!["no such port".to_owned()],
        Endpoints::Of(endpoints) => {
            let mut all: Vec<String> = endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect();
            all.sort();
            all
        }
    };
    assert_eq!(
        endpoints(&state, &service, "10.96.0.1:80"),
        ["10.0.0.1:8080", "10.0.0.3:9090"]
    );
    assert_eq!(
        endpoints(&state, &service, "[fd96::1]:80"),
        ["[fd00::1]:8080", "[fd00::2]:8080"]
    );
    assert!(endpoints(&state, &service, "10.96.0.1:81").is_empty(), "nobody has it");
    assert_eq!(endpoints(&state, &service, "10.96.0.1:82"), ["no such port"]);
    let unready_too = Service {
        only_healthy: false,
        ..service.clone()
    };
    assert_eq!(endpoints(&state, &unready_too, "10.96.0.1:80").len(), 3);
    state.apply(vec![
        Change::RemoveAddress("Kubernetes//Pod/shop/own-port".into()),
        Change::Workload(of("dual", &["10.0.0.9"], 8080)),
    ]);
    assert_eq!(endpoints(&state, &service, "10.96.0.1:80"), ["10.0.0.9:8080"]);
}

#[tokio::test(start_paused = true)]
async fn waiting_sees_what_arrives_and_is_bounded() {
    let shared = SharedState::new();
    let ip: IpAddr = "10.0.0.1".parse().unwrap();
    let find = move |state: &State| state.by_address(ip);
    assert!(shared.wait_for(Duration::from_secs(5), find).await.is_none());

    let waiting = tokio::spawn({
        let shared = shared.clone();
        async move { shared.wait_for(Duration::from_secs(5), find).await }
    });
    tokio::task::yield_now().await;
    shared.apply(vec![Change::Workload(workload("web", "10.0.0.1", Membership::Proven))]);
    assert_eq!(&*waiting.await.unwrap().unwrap().name, "web");
}

#[test]
fn a_pod_that_was_proven_is_not_pending_again_whatever_is_told() {
    let ip = to("10.0.1.1:80");
    let told = |memberships: &[(Membership, &str)]| {
        let mut state = State::default();
        for (membership, uid) in memberships {
            let mut workload = workload("web", "10.0.1.1", *membership);
            workload.pod_uid = (*uid).into();
            state.apply(vec![Change::Workload(workload)]);
        }
        match state.destination(ip) {
            Destination::Mesh(_) => "mesh",
            Destination::Pending(_) => "pending",
            Destination::Lost(_) => "lost",
            Destination::Outside(_) => "outside",
            _ => "else",
        }
    };
    use Membership::{Lost, Outside, Pending, Proven};
    for (memberships, expected) in [
        (&[(Pending, "u")][..], "pending"),
        (&[(Proven, "u"), (Pending, "u")], "lost"),
        (&[(Lost, "u"), (Pending, "u")], "lost"),
        (&[(Proven, "u"), (Pending, "u"), (Pending, "u")], "lost"),
        (&[(Proven, "u"), (Pending, "u"), (Proven, "u")], "mesh"),
        // Another Pod of that name, and one that left the mesh and came back.
        (&[(Proven, "u"), (Pending, "v")], "pending"),
        (&[(Proven, "u"), (Outside, "u"), (Pending, "u")], "pending"),
        // One that left another maker's mesh, whose word on it was nobody's proof.
        (&[(Proven, ""), (Pending, "u")], "pending"),
        // Another maker's control plane tells no uid.
        (&[(Proven, ""), (Pending, "")], "pending"),
    ] {
        let is = told(memberships);
        assert_eq!(is, expected, "{memberships:?} is reached as {is}");
    }
}
