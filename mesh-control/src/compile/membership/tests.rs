use std::sync::Arc;

use super::*;
use crate::capture_states::CaptureStates;
use crate::compile::testing::parameters;
use crate::compile::{EndpointSource, Snapshot, compile};
use crate::registry::{Registry, Scan};

const NODES: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {culvert.dev/mesh: enabled}}
---
apiVersion: v1
kind: Namespace
metadata: {name: batch, labels: {culvert.dev/mesh: enabled}, annotations: {culvert.dev/enrolment: best-effort}}
---
apiVersion: v1
kind: Namespace
metadata: {name: tools, labels: {culvert.dev/mesh: enabled, culvert.dev/enrolment: best-effort}}
---
apiVersion: v1
kind: Namespace
metadata: {name: kube-system, labels: {culvert.dev/mesh: enabled}}
---
apiVersion: v1
kind: Namespace
metadata: {name: culvert-system, labels: {culvert.dev/mesh: enabled}}
---
apiVersion: v1
kind: Namespace
metadata: {name: outside}
"#;

fn pod(namespace: &str, name: &str, node: &str, more_metadata: &str, more_spec: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, uid: uid-{name}{more_metadata}}}\n\
         spec: {{nodeName: {node}, serviceAccountName: {name}{more_spec}}}\nstatus: {{}}\n"
    )
}

fn snapshot(pods: &[String]) -> Snapshot {
    let mut registry = Registry::default();
    let text = [NODES.to_owned()]
        .iter()
        .chain(pods)
        .cloned()
        .collect::<Vec<_>>()
        .join("---\n");
    let scan: Scan = [("all.yaml".to_owned(), Ok(Arc::from(text.as_str())))].into();
    registry.apply(&scan);
    assert_eq!(registry.rejections(), []);
    let parameters = parameters(EndpointSource::Selectors);
    compile(&registry.world(), &CaptureStates::default(), &parameters)
}

fn told<'a>(snapshot: &'a Snapshot, node: &str) -> Vec<(&'a str, bool)> {
    let pods = snapshot.enrolment.nodes.get(node).map(|node| &node.pods);
    pods.into_iter()
        .flatten()
        .map(|pod| (pod.name.as_str(), pod.is_member))
        .collect()
}

#[test]
fn a_node_is_told_of_its_own_pods_and_which_of_them_are_members() {
    let snapshot = snapshot(&[
        pod("shop", "web", "node-a", "", ""),
        pod("shop", "out", "node-a", ", labels: {culvert.dev/mesh: disabled}", ""),
        pod("shop", "host", "node-a", "", ", hostNetwork: true"),
        pod("outside", "stranger", "node-a", "", ""),
        pod("shop", "other", "node-b", "", ""),
        pod("shop", "unscheduled", "''", "", ""),
    ]);
    assert_eq!(
        told(&snapshot, "node-a"),
        [("host", false), ("out", false), ("stranger", false), ("web", true)]
    );
    assert_eq!(told(&snapshot, "node-b"), [("other", true)]);
    assert_eq!(snapshot.enrolment.nodes.len(), 2);
}

#[test]
fn namespaces_are_told_with_their_wish_and_those_that_would_deadlock_are_ignored_and_named() {
    let snapshot = snapshot(&[
        pod("kube-system", "dns", "node-a", "", ""),
        pod("culvert-system", "control", "node-a", "", ""),
    ]);
    let expected = [("batch", true), ("shop", false), ("tools", true)].map(|(name, wish)| (name.to_owned(), wish));
    assert_eq!(snapshot.enrolment.namespaces.names, expected.into());
    assert_eq!(snapshot.enrolment.kept_out, ["culvert-system", "kube-system"]);
    assert_eq!(told(&snapshot, "node-a"), [("control", false), ("dns", false)]);
    // Nor may the node have certificates for them.
    assert_eq!(snapshot.identities.get("node-a"), None);
    let warnings: Vec<String> = snapshot.enrolment.warnings().collect();
    assert!(warnings.iter().any(|warning| warning.contains("kube-system")), "{warnings:?}");
}

#[test]
fn who_cannot_be_a_member_is_refused_with_the_reason_and_is_outside_for_its_peers() {
    let snapshot = snapshot(&[
        pod(
            "shop",
            "ambient",
            "n",
            ", annotations: {ambient.istio.io/redirection: enabled}",
            "",
        ),
        pod(
            "shop",
            "injected",
            "n",
            "",
            ", containers: [{name: app}, {name: istio-proxy}]",
        ),
        pod("shop", "native", "n", "", ", initContainers: [{name: linkerd-proxy}]"),
        pod("shop", "annotated", "n", ", annotations: {sidecar.istio.io/status: '{}'}", ""),
        pod("shop", "static", "n", ", annotations: {kubernetes.io/config.mirror: '1'}", ""),
        pod("shop", "vm", "n", "", ", runtimeClassName: kata-qemu"),
        pod("shop", "crun", "n", "", ", runtimeClassName: crun"),
        // Who does not ask is not refused.
        pod("outside", "elsewhere", "n", "", ", runtimeClassName: gvisor"),
    ]);
    let reasons: Vec<(&str, &str)> = (snapshot.enrolment.refused.iter())
        .map(|(pod, refusal)| (pod.as_str(), refusal.reason()))
        .collect();
    assert_eq!(
        reasons,
        [
            ("shop/ambient", "captured_elsewhere"),
            ("shop/annotated", "sidecar"),
            ("shop/injected", "sidecar"),
            ("shop/native", "sidecar"),
            ("shop/static", "static"),
            ("shop/vm", "vm_runtime"),
        ]
    );
    let members: Vec<&str> = (told(&snapshot, "n").into_iter())
        .filter_map(|(name, is_member)| is_member.then_some(name))
        .collect();
    assert_eq!(members, ["crun"]);
    let of_peers: Vec<&str> = (snapshot.pods.values().filter(|place| place.is_member))
        .map(|place| place.name.as_str())
        .collect();
    // The one of another ambient mesh takes tunnels.
    assert_eq!(of_peers, ["ambient", "crun"]);
}

/// A kubelet may show static Pods of its node in any namespace, and they have no account but the default one.
#[test]
fn a_static_pod_gives_its_node_no_identity() {
    let snapshot = snapshot(&[
        pod("shop", "shown", "n", ", annotations: {kubernetes.io/config.mirror: '1'}", ""),
        pod(
            "shop",
            "claims",
            "n",
            ", annotations: {kubernetes.io/config.mirror: '1', ambient.istio.io/redirection: enabled}",
            "",
        ),
        pod("shop", "web", "other", "", ""),
    ]);
    let nodes: Vec<&str> = snapshot.identities.keys().map(String::as_str).collect();
    assert_eq!(nodes, ["other"], "a node was given the identity of Pods that it alone shows");
}

#[test]
fn beyond_the_bound_members_are_told_and_the_rest_is_counted() {
    let mut node = NodePods::default();
    for i in 0..=MAX_NODE_PODS {
        node.pods.push(NodePod {
            uid: format!("uid-{i:05}"),
            namespace: "shop".into(),
            name: "pod".into(),
            service_account: "default".into(),
            addresses: vec![],
            is_member: i == MAX_NODE_PODS,
            refused: None,
            probe_ports: vec![],
        });
    }
    let node = node.bounded();
    assert_eq!((node.pods.len(), node.omitted), (MAX_NODE_PODS, 1));
    assert!(node.pods.iter().any(|pod| pod.is_member), "the member was left out");
    assert!(node.pods.is_sorted_by(|a, b| a.uid < b.uid));
}

#[test]
fn of_too_many_probe_ports_the_lowest_are_told_and_that_is_said() {
    let namespaces = Labels::from([(MESH_LABEL.to_owned(), "enabled".to_owned())]);
    let namespace = Namespace {
        labels: &namespaces,
        best_effort: false,
    };
    let id = ObjectId {
        kind: crate::objects::Kind::Pod,
        namespace: "shop".into(),
        name: "web".into(),
    };
    let pod = |ports: u16| Pod {
        uid: "uid".into(),
        node: "node".into(),
        probe_ports: (1..=ports).collect(),
        ..Pod::default()
    };
    let told = |pod: &Pod| enrolment(&BTreeMap::from([("shop", namespace)]), &[(&id, pod)]);
    let fits = told(&pod(16));
    assert_eq!(fits.nodes["node"].pods[0].probe_ports, (1..=16).collect::<Vec<_>>());
    assert_eq!(fits.warnings().count(), 0);
    let cut = told(&pod(17));
    assert_eq!(cut.nodes["node"].pods[0].probe_ports, (1..=16).collect::<Vec<_>>());
    let said: Vec<_> = cut.warnings().collect();
    assert!(said[0].contains("Pod shop/web has probes at 17 ports"), "{said:?}");
}
