use std::sync::Arc;

use super::*;
use crate::capture_states::CaptureStates;
use crate::compile::{EndpointSource, Parameters, compile};
use crate::objects::Kind;
use crate::registry::convert;

const MESH: &str = r#"
kind: Namespace
metadata: {name: shop, labels: {culvert.dev/mesh: enabled, team: shop}}
---
kind: Namespace
metadata: {name: out, labels: {team: out}}
---
kind: Node
metadata: {name: n}
spec: {podCIDRs: [10.1.0.0/16]}
---
kind: Pod
metadata: {name: web-1, namespace: shop, uid: w1, labels: {app: web}}
spec: {nodeName: n, containers: [{name: c, ports: [{name: http, containerPort: 8080}, {name: mesh, containerPort: 15008}]}]}
---
kind: Pod
metadata: {name: web-2, namespace: shop, uid: w2, labels: {app: web}}
spec: {nodeName: n, containers: [{name: c, ports: [{name: http, containerPort: 8080}, {name: mesh, containerPort: 15008}]}]}
---
kind: Pod
metadata: {name: client, namespace: shop, uid: c, labels: {app: client}}
spec: {nodeName: n}
---
kind: Pod
metadata: {name: outsider, namespace: out, uid: o, labels: {app: web}}
spec: {nodeName: n}
"#;

fn world(policies: &[&str]) -> World {
    let mut world = World::new();
    let policies = policies
        .iter()
        .enumerate()
        .map(|(i, spec)| format!("kind: NetworkPolicy\nmetadata: {{name: p{i}, namespace: shop}}\nspec: {spec}\n"));
    for document in MESH.split("---\n").map(str::to_owned).chain(policies) {
        let value: serde_json::Value = serde_norway::from_str(&document).expect("YAML");
        let kind = Kind::ALL
            .into_iter()
            .find(|kind| value["kind"] == kind.as_str())
            .expect("a kind");
        let text_of = |name: &str| value["metadata"][name].as_str().unwrap_or_default().to_owned();
        let id = ObjectId {
            kind,
            namespace: text_of("namespace"),
            name: text_of("name"),
        };
        let object = convert::parse(&id, &value).unwrap_or_else(|error| panic!("{error}: {document}"));
        world.insert(id, Arc::new(object));
    }
    world
}

fn findings(policies: &[&str]) -> Findings {
    let world = world(policies);
    let parameters = Parameters {
        trust_domain: "cluster.local".into(),
        cluster: "Kubernetes".into(),
        pod_ranges: vec![],
        trust_bundle: vec![],
        revoked: BTreeSet::new(),
        endpoints: EndpointSource::Slices,
        mesh_namespace: "culvert-system".into(),
    };
    in_the_way(&world, &compile(&world, &CaptureStates::default(), &parameters))
}

/// Policy, direction, Pods.
fn found(policies: &[&str]) -> Vec<(String, Direction, usize)> {
    let found = findings(policies).policies.into_iter();
    found.map(|finding| (finding.name, finding.direction, finding.pods)).collect()
}

#[test]
fn which_policies_are_in_the_way() {
    use Direction::{Egress, Ingress};
    const WEB: &str = "podSelector: {matchLabels: {app: web}}";
    const CLIENT: &str = "{podSelector: {matchLabels: {app: client}}}";
    let table: &[(&str, &[&str], &[(&str, Direction, usize)])] = &[
        (
            "the application's port alone",
            &["{@, ingress: [{ports: [{port: 8080}]}]}"],
            &[("p0", Ingress, 2)],
        ),
        (
            "by its name",
            &["{@, ingress: [{ports: [{port: http}]}]}"],
            &[("p0", Ingress, 2)],
        ),
        (
            "the mesh's beside it",
            &["{@, ingress: [{ports: [{port: 8080}, {port: 15008}]}]}"],
            &[],
        ),
        (
            "the mesh's by a name",
            &["{@, ingress: [{ports: [{port: 8080}, {port: mesh}]}]}"],
            &[],
        ),
        (
            "in a range",
            &["{@, ingress: [{ports: [{port: 8080, endPort: 16000}]}]}"],
            &[],
        ),
        (
            "the mesh's for UDP",
            &["{@, ingress: [{ports: [{port: 8080}, {port: 15008, protocol: UDP}]}]}"],
            &[("p0", Ingress, 2)],
        ),
        ("all of TCP", &["{@, ingress: [{ports: [{protocol: TCP}]}]}"], &[]),
        ("all ports", &["{@, ingress: [{from: [CLIENT]}]}"], &[]),
        ("nothing at all is what it says", &["{@, policyTypes: [Ingress]}"], &[]),
        ("UDP alone", &["{@, ingress: [{ports: [{port: 8080, protocol: UDP}]}]}"], &[]),
        (
            "from a client of the mesh",
            &["{@, ingress: [{from: [CLIENT], ports: [{port: 8080}]}]}"],
            &[("p0", Ingress, 2)],
        ),
        (
            "from elsewhere",
            &["{@, ingress: [{from: [{namespaceSelector: {matchLabels: {team: out}}}], ports: [{port: 8080}]}]}"],
            &[],
        ),
        (
            "from namespaces of which one is in the mesh",
            &[
                "{@, ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: team, operator: Exists}]}}], ports: [{port: 8080}]}]}",
            ],
            &[("p0", Ingress, 2)],
        ),
        (
            "from the internet",
            &["{@, ingress: [{from: [{ipBlock: {cidr: 203.0.113.0/24}}], ports: [{port: 8080}]}]}"],
            &[],
        ),
        (
            "from Pods by their addresses",
            &["{@, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}}], ports: [{port: 8080}]}]}"],
            &[("p0", Ingress, 2)],
        ),
        (
            "another policy lets the mesh in from everybody",
            &[
                "{@, ingress: [{from: [CLIENT], ports: [{port: 8080}]}]}",
                "{podSelector: {}, ingress: [{ports: [{port: 15008}]}]}",
            ],
            &[],
        ),
        (
            "another policy lets it in from the same",
            &[
                "{@, ingress: [{from: [CLIENT], ports: [{port: 8080}]}]}",
                "{@, ingress: [{from: [CLIENT], ports: [{port: 15008}]}]}",
            ],
            &[],
        ),
        (
            "another policy lets it in from others",
            &[
                "{@, ingress: [{from: [CLIENT], ports: [{port: 8080}]}]}",
                "{@, ingress: [{from: [{podSelector: {matchLabels: {app: db}}}], ports: [{port: 15008}]}]}",
            ],
            &[("p0", Ingress, 2)],
        ),
        (
            "another policy is of other Pods",
            &[
                "{@, ingress: [{ports: [{port: 8080}]}]}",
                "{podSelector: {matchLabels: {app: db}}, ingress: [{ports: [{port: 15008}]}]}",
            ],
            &[("p0", Ingress, 2)],
        ),
        (
            "a client's way out",
            &["{podSelector: {matchLabels: {app: client}}, policyTypes: [Egress], egress: [{ports: [{port: 8080}]}]}"],
            &[("p0", Egress, 1)],
        ),
        (
            "a client's way to DNS",
            &["{podSelector: {}, policyTypes: [Egress], egress: [{ports: [{port: 53}, {port: 53, protocol: UDP}]}]}"],
            &[],
        ),
        (
            "both ways, by one policy with two rules",
            &[
                "{@, policyTypes: [Ingress, Egress], ingress: [{ports: [{port: 8080}]}, {ports: [{port: 8081}]}], egress: [{ports: [{port: 5432}]}]}",
            ],
            &[("p0", Ingress, 2), ("p0", Egress, 2)],
        ),
        (
            "of Pods that are no members",
            &["{podSelector: {matchLabels: {app: nobody}}, ingress: [{ports: [{port: 8080}]}]}"],
            &[],
        ),
    ];
    for (what, policies, expected) in table {
        let policies: Vec<String> = policies
            .iter()
            .map(|text| text.replace('@', WEB).replace("CLIENT", CLIENT))
            .collect();
        let policies: Vec<&str> = policies.iter().map(String::as_str).collect();
        let expected: Vec<_> = expected
            .iter()
            .map(|(name, way, pods)| ((*name).to_owned(), *way, *pods))
            .collect();
        assert_eq!(found(&policies), expected, "{what}");
    }
}

#[test]
fn the_advice_names_the_policy_the_port_and_the_place() {
    let findings = findings(&["{podSelector: {matchLabels: {app: web}}, ingress: [{ports: [{port: 8080}]}]}"]);
    let finding = &findings.policies[0];
    let advice = finding.advice();
    for part in ["shop/p0", "15008", "spec.ingress"] {
        assert!(advice.contains(part), "{advice}");
    }
    assert!(
        advice.len() <= crate::limits::MAX_EVENT_NOTE_BYTES - 2 * 253,
        "long names find room"
    );
    assert_eq!(
        finding.named,
        [("web-1".to_owned(), "w1".to_owned()), ("web-2".to_owned(), "w2".to_owned())]
    );
}

#[test]
fn findings_are_named_within_a_bound_and_counted_beyond() {
    let one = "{podSelector: {}, ingress: [{ports: [{port: 8080}]}]}";
    let many = vec![one; MAX_NETWORK_POLICIES_NAMED + 3];
    let findings = findings(&many);
    assert_eq!(
        (findings.policies.len(), findings.more, findings.is_cut),
        (MAX_NETWORK_POLICIES_NAMED, 3, false)
    );
}
