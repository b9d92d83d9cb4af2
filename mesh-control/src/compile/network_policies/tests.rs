use super::*;
use crate::capture_states::CaptureStates;
use crate::compile::{EndpointSource, compile, testing};

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

/// MESH, with these policies of `shop`.
fn world(policies: &[&str]) -> World {
    let policies = policies
        .iter()
        .enumerate()
        .map(|(i, spec)| format!("---\nkind: NetworkPolicy\nmetadata: {{name: p{i}, namespace: shop}}\nspec: {spec}\n"));
    testing::world(&std::iter::once(MESH.to_owned()).chain(policies).collect::<String>())
}

fn findings(policies: &[&str]) -> Findings {
    findings_of(&world(policies))
}

fn findings_of(world: &World) -> Findings {
    in_the_way(world, &compiled(world))
}

fn compiled(world: &World) -> Snapshot {
    let parameters = testing::parameters(EndpointSource::Slices);
    compile(world, &CaptureStates::default(), &parameters)
}

/// Policy, direction, Pods.
fn found(policies: &[&str]) -> Vec<(String, Direction, usize)> {
    let found = findings(policies).policies.into_iter();
    found.map(|finding| (finding.name, finding.direction, finding.pods)).collect()
}

/// What is tried, the policies, and what is found.
type Case = (
    &'static str,
    &'static [&'static str],
    &'static [(&'static str, Direction, usize)],
);

#[test]
fn which_policies_are_in_the_way() {
    use Direction::{Egress, Ingress};
    const WEB: &str = "podSelector: {matchLabels: {app: web}}";
    const CLIENT: &str = "{podSelector: {matchLabels: {app: client}}}";
    let table: &[Case] = &[
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
            "from addresses without those of Pods",
            &["{@, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}], ports: [{port: 8080}]}]}"],
            &[],
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
            "another policy lets all Pods of its namespace in",
            &[
                "{@, ingress: [{from: [CLIENT], ports: [{port: 8080}]}]}",
                "{@, ingress: [{from: [{podSelector: {}}], ports: [{port: 15008}]}]}",
            ],
            &[],
        ),
        (
            "another policy lets all Pods of all namespaces in",
            &[
                "{@, ingress: [{ports: [{port: 8080}]}]}",
                "{@, ingress: [{from: [{namespaceSelector: {}}], ports: [{port: 15008}]}]}",
            ],
            &[],
        ),
        (
            "another policy lets the addresses of all Pods in",
            &[
                "{@, ingress: [{ports: [{port: 8080}]}]}",
                "{@, ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0}}], ports: [{port: 15008}]}]}",
            ],
            &[],
        ),
        (
            "another policy lets some of them in",
            &[
                "{@, ingress: [{ports: [{port: 8080}]}]}",
                "{@, ingress: [{from: [{ipBlock: {cidr: 10.1.0.0/24}}], ports: [{port: 15008}]}]}",
            ],
            &[("p0", Ingress, 2)],
        ),
        (
            "who is no member needs no tunnel",
            &[
                "{@, ingress: [{from: [CLIENT, {ipBlock: {cidr: 203.0.113.0/24}}], ports: [{port: 8080}]}]}",
                "{@, ingress: [{from: [CLIENT], ports: [{port: 15008}]}]}",
            ],
            &[],
        ),
        (
            "two other policies let each of them in",
            &[
                "{@, ingress: [{from: [CLIENT, {podSelector: {matchLabels: {app: web}}}], ports: [{port: 8080}]}]}",
                "{@, ingress: [{from: [CLIENT], ports: [{port: 15008}]}]}",
                "{@, ingress: [{from: [{podSelector: {matchLabels: {app: web}}}], ports: [{port: 15008}]}]}",
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
            "a client's way out, the mesh's port by the name that servers have for it",
            &[
                "{podSelector: {matchLabels: {app: client}}, policyTypes: [Egress], egress: [{ports: [{port: 8080}, {port: mesh}]}]}",
            ],
            &[],
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
}

#[test]
fn findings_are_named_within_a_bound_each_namespace_in_turn_and_counted_beyond() {
    // Another namespace of the mesh has one policy.
    let world = world_of(1, &[ONE; MAX_NETWORK_POLICIES_NAMED + 3]);
    let findings = findings_of(&world);
    assert_eq!(findings.policies.len(), MAX_NETWORK_POLICIES_NAMED);
    assert_eq!(findings.count[&Direction::Ingress], MAX_NETWORK_POLICIES_NAMED + 4);
    assert_eq!((findings.count.len(), findings.cut), (1, 0));
    let world = world_of(MAX_NETWORK_POLICIES_NAMED, &[ONE; 3]);
    let of_shop = |finding: &&Finding| finding.namespace == "shop";
    assert_eq!(findings_of(&world).policies.iter().filter(of_shop).count(), 0);
    let world = world_of(MAX_NETWORK_POLICIES_NAMED - 1, &[ONE; 3]);
    assert_eq!(findings_of(&world).policies.iter().filter(of_shop).count(), 1);
}

/// As MESH, with so many namespaces that have one policy each.
fn world_of(namespaces: usize, policies: &[&str]) -> World {
    let mut world = world(policies);
    for number in 0..namespaces {
        world.extend(testing::world(&format!(
            "kind: Namespace\nmetadata: {{name: n{number}, labels: {{culvert.dev/mesh: enabled}}}}\n---\n\
             kind: Pod\nmetadata: {{name: a, namespace: n{number}, uid: z{number}}}\nspec: {{nodeName: n}}\n---\n\
             kind: NetworkPolicy\nmetadata: {{name: p, namespace: n{number}}}\nspec: {ONE}\n"
        )));
    }
    world
}

const ONE: &str = "{podSelector: {}, ingress: [{ports: [{port: 8080}]}]}";

#[test]
fn a_namespace_that_is_too_much_to_compare_keeps_no_other_from_it() {
    // Each rule that is shut is covered by one of those that are open, and compared with all before it until that is found.
    let rules = |port: u16| {
        let rule = |number: usize| {
            format!(
                "{{from: [{{podSelector: {{matchLabels: {{app: web, n: \"{port}-{number}\"}}}}}}, {{ipBlock: {{cidr: 10.1.{number}.0/24}}}}], ports: [{{port: {port}}}]}}"
            )
        };
        let rules: Vec<String> = (0..200).map(rule).collect();
        format!("{{podSelector: {{}}, ingress: [{}]}}", rules.join(", "))
    };
    let (open, shut) = (rules(15008), rules(8080));
    let mut policies = vec![ONE, open.as_str()];
    policies.extend(std::iter::repeat_n(shut.as_str(), 10));
    let findings = findings_of(&world_of(1, &policies));
    assert_eq!(findings.cut, 1);
    assert!(findings.policies.iter().any(|finding| finding.namespace == "n0"));
}

#[test]
fn what_all_namespaces_may_take_is_bounded_and_the_smallest_come_first() {
    let large = format!(
        "{{podSelector: {{}}, ingress: [{}]}}",
        vec!["{ports: [{port: 8080}]}"; 50].join(", ")
    );
    let world = world_of(3, &[&large]);
    let snapshot = compiled(&world);
    let found = |all: usize, each: usize| {
        let findings = in_the_way_within(&world, &snapshot, (all, each));
        let mut namespaces: Vec<String> = findings.policies.into_iter().map(|finding| finding.namespace).collect();
        namespaces.sort();
        namespaces.dedup();
        (namespaces.concat(), findings.cut)
    };
    assert_eq!(found(1_000_000, 1_000_000), ("n0n1n2shop".to_owned(), 0));
    assert_eq!(found(1_000_000, 10), ("n0n1n2".to_owned(), 1));
    assert_eq!(found(20, 1_000_000), ("n0n1n2".to_owned(), 1));
    assert_eq!(found(0, 1_000_000), (String::new(), 4));
}

#[test]
fn a_policy_that_is_too_large_is_kept_without_its_parts() {
    let ports = vec!["{port: 8080}"; crate::limits::MAX_NETWORK_POLICY_PARTS].join(", ");
    let world = world(&[ONE, &format!("{{podSelector: {{}}, ingress: [{{ports: [{ports}]}}]}}")]);
    let kept = world.values().find_map(|object| match object.as_ref() {
        Object::NetworkPolicy(policy) if policy.is_too_large => Some(policy.size()),
        _ => None,
    });
    assert_eq!(kept, Some(1));
    let findings = findings_of(&world);
    assert_eq!((findings.policies.len(), findings.cut), (1, 1));
}
