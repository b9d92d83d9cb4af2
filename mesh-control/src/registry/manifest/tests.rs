use std::net::IpAddr;

use super::*;
use crate::objects::{ServicePort, TargetPort};

const SEVERAL: &str = r#"# comment first
---
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {culvert.dev/mesh: enabled}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: ignored}
---
apiVersion: v1
kind: Pod
metadata:
  name: web-1
  namespace: shop
  uid: 1-2-3
  labels: {app: web, pod-template-hash: abc}
  ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: web-abc, uid: u, controller: true}]
spec:
  nodeName: node-a
  serviceAccountName: web
  containers: [{name: c, ports: [{name: http, containerPort: 8080}, {name: dns, containerPort: 53, protocol: UDP}]}]
status:
  phase: Running
  podIPs: [{ip: 10.1.0.5}, {ip: "fd00::5"}]
  conditions: [{type: Ready, status: "True"}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIPs: [10.96.0.10]
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: http}, {name: dns, port: 53, protocol: UDP}, {name: raw, port: 9000}]
"#;

fn good(text: &str) -> Vec<(ObjectId, Object)> {
    parse_file(text)
        .documents
        .into_iter()
        .map(|document| document.content.expect("good"))
        .collect()
}

fn error(text: &str) -> Rejected {
    let mut documents = parse_file(text).documents;
    assert_eq!(documents.len(), 1, "{documents:?}");
    documents.remove(0).content.expect_err("has to be refused")
}

#[test]
fn manifests_as_people_write_them_are_read() {
    let objects = good(SEVERAL);
    assert_eq!(objects.len(), 3);
    let Object::Pod(pod) = &objects[1].1 else {
        panic!("{objects:?}")
    };
    assert_eq!(
        pod.addresses,
        ["10.1.0.5".parse::<IpAddr>().expect("ip"), "fd00::5".parse().expect("ip")]
    );
    assert_eq!(
        (pod.uid.as_str(), pod.node.as_str(), pod.service_account.as_str()),
        ("1-2-3", "node-a", "web")
    );
    assert_eq!(pod.named_ports.iter().collect::<Vec<_>>(), [(&"http".to_owned(), &8080)]);
    assert_eq!(pod.owner, Some(("ReplicaSet".into(), "web-abc".into())));
    assert!(pod.ready && !pod.finished && !pod.terminating && !pod.host_network);
    let Object::Service(service) = &objects[2].1 else {
        panic!("{objects:?}")
    };
    assert_eq!(
        service.ports,
        [
            ServicePort {
                name: "http".into(),
                port: 80,
                target: TargetPort::Name("http".into())
            },
            ServicePort {
                name: "raw".into(),
                port: 9000,
                target: TargetPort::Number(9000)
            },
        ]
    );
}

#[test]
fn documents_are_numbered_as_written_and_lists_are_opened() {
    assert_eq!(
        parse_file(SEVERAL)
            .documents
            .iter()
            .map(|document| document.number)
            .collect::<Vec<_>>(),
        [1, 3, 4]
    );
    let list = r#"{"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a"}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "b", "namespace": "a"}}]}"#;
    assert_eq!(good(list).len(), 2);
    let windows = SEVERAL.replace('\n', "\r\n");
    assert_eq!(good(&format!("\u{feff}{windows}")).len(), 3);
    assert!(parse_file("").documents.is_empty() && parse_file("---\n---\n# nothing\n").documents.is_empty());
}

#[test]
fn a_broken_document_hides_no_other() {
    let text = SEVERAL.replace("kind: Service\n", "kind: [Service\n");
    let documents = parse_file(&text).documents;
    assert_eq!(documents.len(), 3);
    let rejected = documents[2].content.as_ref().expect_err("broken");
    assert_eq!((rejected.reason, documents[2].number), (Reason::Syntax, 4));
    assert!(documents[..2].iter().all(|document| document.content.is_ok()));
}

#[test]
fn a_key_that_is_there_twice_is_no_manifest() {
    for text in [
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\nmetadata: {name: b}\n",
        "apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: a}\nspec:\n  action: Deny\n  action: Allow\n",
        r#"{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a", "labels": {"x": "1", "x": "2"}}}"#,
    ] {
        let documents = parse_file(text).documents;
        let [
            Document {
                content: Err(rejected), ..
            },
        ] = &documents[..]
        else {
            panic!("{documents:?}")
        };
        assert_eq!(rejected.reason, Reason::Syntax);
        assert!(rejected.message.contains("duplicate"), "{}", rejected.message);
    }
}

#[test]
fn errors_name_object_and_field() {
    let cases = [
        (
            "kind: Pod\nmetadata: {name: a}\nstatus: {podIPs: [{ip: 10.0.0.256}]}",
            "status.podIPs[0].ip: \"10.0.0.256\" is no IP address",
        ),
        (
            "kind: Pod\nmetadata: {name: a}\nstatus: {podIPs: [{ip: 127.0.0.1}]}",
            "status.podIPs[0].ip: 127.0.0.1 cannot be an address of its own",
        ),
        (
            "kind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: c, ports: [{containerPort: 0}]}]}",
            "spec.containers[0].ports[0].containerPort: 0 is no port; give 1-65535",
        ),
        (
            "kind: Pod\nmetadata: {name: a}\nspec: {hostNetwork: sure}",
            "spec.hostNetwork: invalid type",
        ),
        ("kind: Pod\nmetadata: {name: a, uid: a/b}", "metadata.uid: \"a/b\" is no uid"),
        (
            "kind: Service\nmetadata: {name: a}\nspec: {ports: [{port: 70000}]}",
            "spec.ports[0].port: 70000 is no port; give 1-65535",
        ),
        (
            "kind: Service\nmetadata: {name: a}\nspec: {ports: [{port: 80}, {port: 80}]}",
            "spec.ports[1].port: 80 is there already",
        ),
        (
            "kind: Node\nmetadata: {name: a}\nspec: {podCIDRs: [10.0.0.0/40]}",
            "spec.podCIDRs[0]: \"10.0.0.0/40\" is no address range",
        ),
    ];
    for (text, expected) in cases {
        let rejected = error(&format!("apiVersion: v1\n{text}\n"));
        assert!(rejected.message.starts_with(expected), "{}", rejected.message);
        assert_eq!(rejected.id.expect("readable").name, "a");
        assert_eq!(rejected.reason, Reason::Field);
    }
    let policy = |spec: &str| {
        error(&format!(
            "apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: p}}\nspec: {spec}\n"
        ))
        .message
    };
    assert_eq!(
        policy("{action: Deny, rules: [{to: [{ports: [80, 0]}]}]}"),
        "spec.rules[0].to[0].ports[1]: 0 is no port; give 1-65535"
    );
    assert!(
        policy("{action: Allow, rules: [{from: [{principal: [a]}]}]}")
            .starts_with("spec.rules[0].from[0].principal: unknown field")
    );
    assert!(policy("{action: Maybe}").starts_with("spec.action: unknown variant"));
    for (text, expected) in [
        ("just text", "no Kubernetes object"),
        ("a: 1", "no Kubernetes object: apiVersion and kind are needed"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: A/b}", "metadata.name:"),
        (
            "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: ../b}",
            "metadata.namespace:",
        ),
        (
            "apiVersion: culvert.dev/v1\nkind: AuthorizationPolicy",
            "apiVersion: \"culvert.dev/v1\" is unknown with kind \"AuthorizationPolicy\"; write culvert.dev/v1alpha1",
        ),
    ] {
        let rejected = error(text);
        assert!(rejected.message.starts_with(expected), "{}", rejected.message);
        assert_eq!((rejected.id, rejected.reason), (None, Reason::Syntax));
    }
}

#[test]
fn defaults_are_those_of_kubernetes() {
    let objects = good("apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {}\nstatus: {podIP: 10.0.0.1, phase: Succeeded}\n");
    assert_eq!(objects[0].0.namespace, "default");
    let Object::Pod(pod) = &objects[0].1 else {
        panic!("{objects:?}")
    };
    assert_eq!(pod.service_account, "default");
    assert!(pod.finished && pod.ready);
    assert!(objects[0].1.exclusive_addresses().is_empty());
    let headless = good("apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {clusterIP: None}\n");
    assert!(headless[0].1.exclusive_addresses().is_empty());
}

#[test]
fn what_seems_meant_for_the_mesh_is_told_and_the_rest_is_not() {
    let ignored = |api_version: &str, kind: &str| {
        let parsed = parse_file(&format!("apiVersion: {api_version}\nkind: {kind}\nmetadata: {{name: a}}\n"));
        assert!(parsed.documents.is_empty(), "{api_version} {kind}");
        parsed.ignored
    };
    for (api_version, kind) in [
        ("security.istio.io/v1", "AuthorizationPolicy"),
        ("security.istio.io/v1", "PeerAuthentication"),
        ("culvert.de/v1alpha1", "AuthorizationPolicy"),
        ("culvert.de/v1alpha1", "MeshConfig"),
        ("v1", "pod"),
        ("V1", "Namespace"),
    ] {
        assert_eq!(ignored(api_version, kind), [format!("document 1: {kind} of {api_version}")]);
    }
    for (api_version, kind) in [
        ("apps/v1", "Deployment"),
        ("serving.knative.dev/v1", "Service"),
        ("v1", "ConfigMap"),
    ] {
        assert!(ignored(api_version, kind).is_empty(), "{api_version} {kind}");
    }
    let unknown = error("apiVersion: culvert.dev/v1alpha1\nkind: AuthorisationPolicy\nmetadata: {name: a}\n");
    assert_eq!(
        (unknown.id, unknown.reason),
        (None, Reason::Syntax),
        "and so keeps what the file held before"
    );
}

#[test]
fn a_mesh_config_is_read_for_its_namespace_and_only_by_its_name() {
    let config = |namespace: &str, name: &str, spec: &str| {
        format!(
            "apiVersion: culvert.dev/v1alpha1\nkind: MeshConfig\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
        )
    };
    let read = good(&config("culvert-system", "default", "{mtls: Strict, excludedPorts: [22]}"));
    let Object::MeshConfig(mesh) = &read[0].1 else {
        panic!("{read:?}")
    };
    assert_eq!((mesh.mtls, mesh.excluded_ports.contains(&22)), (mesh_api::Mtls::Strict, true));
    assert_eq!(good(&config("shop", "default", "{mtls: Strict}")).len(), 1);
    let exclusion = error(&config("shop", "default", "{mtls: Strict, excludedPorts: [22]}"));
    assert_eq!(exclusion.reason, Reason::Field);
    assert!(
        exclusion
            .message
            .starts_with("spec.excludedPorts: is for the whole mesh only"),
        "{}",
        exclusion.message
    );
    let second = error(&config("shop", "other", "{mtls: Permissive}"));
    assert_eq!(second.reason, Reason::Conflict);
    assert!(
        second.message.contains("only MeshConfig shop/default counts"),
        "{}",
        second.message
    );
}
