use std::sync::Arc;

use super::*;
use crate::accounts::Accounts;
use crate::capture_states::Proof;
use crate::compile::{EndpointSource, Parameters};
use crate::control_plane::Shared;
use crate::limits::{Bounds, NOT_ENROLLED_AFTER};
use crate::registry::{Registry, Scan};

const WORLD: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {culvert.dev/mesh: enabled}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, uid: u}
spec: {nodeName: n}
---
apiVersion: v1
kind: Pod
metadata: {name: vm, namespace: shop, uid: vm}
spec: {nodeName: n, runtimeClassName: kata}
"#;

fn control(world: &str) -> (ControlPlane, Arc<Shared>) {
    let parameters = Parameters {
        trust_domain: "cluster.local".into(),
        cluster: "Kubernetes".into(),
        pod_ranges: vec![],
        trust_bundle: vec![],
        revoked: std::collections::BTreeSet::new(),
        endpoints: EndpointSource::Slices,
        mesh_namespace: "mesh".into(),
    };
    let shared = Arc::new(Shared::default());
    let metrics = Arc::new(Metrics::new().expect("metrics"));
    let control = ControlPlane::shared(
        parameters,
        Accounts::default(),
        Arc::clone(&shared),
        metrics,
        Bounds::default(),
    );
    set(&control, world);
    (control, shared)
}

fn set(control: &ControlPlane, world: &str) {
    let mut registry = Registry::default();
    registry.apply(&Scan::from([("a.yaml".to_owned(), Ok(Arc::from(world)))]));
    assert!(registry.rejections().is_empty(), "{:?}", registry.rejections());
    control.set_world(&registry);
}

fn word(uid: &str, proof: Proof) -> PodWord {
    PodWord {
        uid: uid.into(),
        namespace: "shop".into(),
        name: "web".into(),
        proof,
        reason: "somebody else answers".into(),
        repaired: vec![],
    }
}

/// Kind and name of what it is about, reason; and `problem`, Pod, text.
fn told(control: &ControlPlane, shared: &Shared) -> Vec<(String, String, String)> {
    told_at(control, shared, Instant::now())
}

fn told_at(control: &ControlPlane, shared: &Shared, now: Instant) -> Vec<(String, String, String)> {
    let mut told = Vec::new();
    while let Ok(notice) = shared.take_notice(now, SystemTime::now(), &control.metrics) {
        told.push(match notice {
            Notice::Event(event) => (
                event.subject.kind.to_owned(),
                event.subject.name,
                event.reason.as_str().to_owned(),
            ),
            Notice::Problem(problem) => ("problem".to_owned(), problem.pod.name, problem.text.unwrap_or_default()),
        });
    }
    told.sort();
    told
}

fn expected(list: &[(&str, &str, &str)]) -> Vec<(String, String, String)> {
    let owned = |(a, b, c): &(&str, &str, &str)| ((*a).to_owned(), (*b).to_owned(), (*c).to_owned());
    list.iter().map(owned).collect()
}

#[tokio::test]
async fn who_cannot_be_enrolled_is_told_why_and_who_leaves_is_told_no_longer() {
    let (control, shared) = control(WORLD);
    let text = "refused: its runtime class runs it in a machine of its own, whose sockets the node does not see";
    assert_eq!(
        told(&control, &shared),
        expected(&[("Pod", "vm", "MeshNotEnrolled"), ("problem", "vm", text)])
    );
    assert_eq!(control.status()["unprotected"]["shop/vm"], text);
    let written = WORLD.replace(
        "uid: vm}",
        &format!("uid: vm, annotations: {{culvert.dev/problem: '{text}'}}}}"),
    );
    set(&control, &written);
    assert_eq!(told(&control, &shared), []);
    set(&control, &written.replace("culvert.dev/mesh: enabled", "a: b"));
    assert_eq!(told(&control, &shared), expected(&[("problem", "vm", "")]));
    assert_eq!(control.status()["unprotected"], serde_json::json!({}));
}

#[tokio::test]
async fn only_the_pods_own_agent_is_heard_and_only_of_that_uid() {
    let (control, shared) = control(WORLD);
    told(&control, &shared);
    let mut lost = word("u", Proof::Lost);
    lost.repaired = vec!["sk_lookup".into()];
    control.set_report("another", vec![lost.clone()]);
    control.set_report("n", vec![word("another", Proof::Lost)]);
    assert_eq!(told(&control, &shared), []);
    control.set_report("n", vec![lost.clone()]);
    let both = [
        ("Pod", "web", "MeshProtectionLost"),
        ("Pod", "web", "MeshProtectionRepaired"),
        ("problem", "web", "lost: somebody else answers"),
    ];
    assert_eq!(told(&control, &shared), expected(&both));
    // What is compiled meanwhile does not tell it again.
    set(
        &control,
        &format!("{WORLD}---\nkind: Node\napiVersion: v1\nmetadata: {{name: n}}\n"),
    );
    assert_eq!(told(&control, &shared), []);
    control.set_report("n", vec![word("u", Proof::Proven)]);
    assert_eq!(told(&control, &shared), expected(&[("Pod", "web", "MeshProtected")]));
}

#[tokio::test]
async fn one_that_stays_pending_is_told_after_a_while() {
    let (control, shared) = control(WORLD);
    told(&control, &shared);
    control.set_report("n", vec![word("u", Proof::Pending)]);
    assert_eq!(told(&control, &shared), []);
    let later = Instant::now() + NOT_ENROLLED_AFTER * 2;
    let both = [
        ("Pod", "web", "MeshNotEnrolled"),
        ("problem", "web", "pending: somebody else answers"),
    ];
    assert_eq!(told_at(&control, &shared, later), expected(&both));
}

#[tokio::test]
async fn a_label_that_is_ignored_and_what_was_repaired_on_a_node_are_told_once() {
    let labelled = "apiVersion: v1\nkind: Namespace\nmetadata: {name: mesh, labels: {culvert.dev/mesh: enabled}}\n";
    let (control, shared) = control(labelled);
    assert_eq!(
        told(&control, &shared),
        expected(&[("Namespace", "mesh", "MeshLabelIgnored")])
    );
    set(&control, &format!("{labelled}---\n{WORLD}"));
    let told_later = told(&control, &shared);
    assert!(told_later.iter().all(|(kind, ..)| kind != "Namespace"), "{told_later:?}");
    control.node_repaired("n", &["connect4".into()]);
    assert_eq!(told(&control, &shared), expected(&[("Node", "n", "MeshProtectionRepaired")]));
}
