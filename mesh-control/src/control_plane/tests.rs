use super::*;
use crate::registry::Scan;
use crate::troubles::{Problem, Repaired};

const MESH: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {culvert.dev/mesh: enabled}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, uid: uid-web}
spec: {nodeName: node-a}
status: {podIPs: [{ip: 10.0.0.1}]}
"#;

fn registry(texts: &[&str]) -> Registry {
    let mut registry = Registry::default();
    let files = texts.iter().enumerate();
    let scan: Scan = files.map(|(i, text)| (format!("{i}.yaml"), Ok(Arc::from(*text)))).collect();
    registry.apply(&scan);
    registry
}

fn control(publish_interval: std::time::Duration) -> (tempfile::TempDir, Arc<ControlPlane>) {
    control_within(Bounds {
        publish_interval,
        ..Bounds::default()
    })
}

fn control_within(bounds: Bounds) -> (tempfile::TempDir, Arc<ControlPlane>) {
    let dir = tempfile::tempdir().expect("directory");
    let state = StateDir::open(&dir.path().join("state")).expect("state");
    let parameters = Parameters {
        trust_domain: "cluster.local".into(),
        cluster: "Kubernetes".into(),
        pod_ranges: vec![],
        trust_bundle: vec![],
        revoked: std::collections::BTreeSet::new(),
        endpoints: crate::compile::EndpointSource::Selectors,
    };
    let metrics = Arc::new(Metrics::new().expect("metrics"));
    let control = ControlPlane::new(parameters, state, metrics, bounds).expect("control plane");
    (dir, Arc::new(control))
}

fn word(proof: Proof) -> Vec<PodWord> {
    vec![PodWord {
        uid: "uid-web".into(),
        namespace: "shop".into(),
        name: "web".into(),
        proof,
        problem: Problem::Other,
        repaired: Repaired::default(),
    }]
}

#[tokio::test]
async fn a_pod_that_goes_to_and_fro_makes_few_snapshots_and_the_last_word_counts() {
    let (_dir, control) = control(std::time::Duration::from_secs(1));
    control.set_world(&registry(&[MESH]));
    let publishing = tokio::spawn(Arc::clone(&control).publish_when_due());
    for turn in 0..100 {
        control.set_report("node-a", word(if turn % 2 == 0 { Proof::Proven } else { Proof::Lost }));
    }
    // Two seconds would have to pass for a third beside the world's.
    assert!(control.metrics.snapshots.get() <= 3, "{}", control.metrics.snapshots.get());
    let lost = async {
        while control.metrics.capture_states.with_label_values(&["lost"]).get() == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), lost)
        .await
        .expect("published");
    assert!(control.metrics.snapshots.get() <= 3, "{}", control.metrics.snapshots.get());
    publishing.abort();
}

#[tokio::test]
async fn another_pods_uid_takes_no_proof_away() {
    let (_dir, control) = control(std::time::Duration::ZERO);
    let mut of_folder = registry(&[MESH]);
    control.set_world(&of_folder);
    control.set_report("node-a", word(Proof::Proven));
    assert_eq!(control.status()["pods"]["shop/web"], "proven");
    let twin = "apiVersion: v1\nkind: Pod\nmetadata: {name: zz-twin, namespace: shop, uid: uid-web, labels: {culvert.dev/mesh: disabled}}\n";
    let scan: Scan = [
        ("!.yaml".to_owned(), Ok(Arc::from(twin))),
        ("0.yaml".to_owned(), Ok(Arc::from(MESH))),
    ]
    .into();
    of_folder.apply(&scan);
    control.set_world(&of_folder);
    assert_eq!(control.status()["pods"]["shop/web"], "proven");
}

#[tokio::test]
async fn a_mesh_without_pod_ranges_is_warned_of() {
    let (_dir, control) = control(std::time::Duration::ZERO);
    assert!(
        control.status()["warnings"].as_array().expect("list").is_empty(),
        "nothing is read yet"
    );
    control.set_world(&registry(&[MESH]));
    assert_eq!(control.metrics.pod_ranges.get(), 0);
    let warning = control.status()["warnings"][0].as_str().expect("a warning").to_owned();
    assert!(warning.contains("--pod-cidr"), "{warning}");
    let node = "apiVersion: v1\nkind: Node\nmetadata: {name: node-a}\nspec: {podCIDRs: [10.0.0.0/24]}\n";
    let other = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: a}\n";
    control.set_world(&registry(&[MESH, node, other]));
    assert_eq!(
        (control.metrics.pod_ranges.get(), control.metrics.manifests_ignored.get()),
        (1, 1)
    );
    assert!(control.status()["warnings"].as_array().expect("list").is_empty());
    assert_eq!(control.status()["pod_ranges"][0], "10.0.0.0/24");
}

#[tokio::test]
async fn what_could_not_be_read_back_is_not_written_and_what_was_kept_stays() {
    let account = |name: &str| format!("apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}, namespace: shop}}\n");
    let (first, second) = (account("a"), account("b"));
    let kept = |dir: &tempfile::TempDir, file: &str| std::fs::read_to_string(dir.path().join("state").join(file)).ok();
    let failed = |control: &ControlPlane| control.metrics.state_writes_failed.get();

    // Both files as they are when one thing is in them.
    let (dir, control) = control(std::time::Duration::ZERO);
    control.set_world(&registry(&[MESH, &first]));
    control.set_report("node-a", word(Proof::Proven));
    // A report may wait for its turn; this does not.
    control.set_world(&registry(&[MESH, &first]));
    let accounts = kept(&dir, ACCOUNTS).expect("accounts");
    let captures = kept(&dir, CAPTURE_STATES).expect("states");
    assert_eq!(failed(&control), 0);

    let (dir, control) = control_within(Bounds {
        accounts_file_bytes: accounts.len() as u64,
        ..Bounds::default()
    });
    control.set_world(&registry(&[MESH, &first]));
    assert_eq!(
        (kept(&dir, ACCOUNTS), failed(&control)),
        (Some(accounts.clone()), 0),
        "exactly as many"
    );
    control.set_world(&registry(&[MESH, &first, &second]));
    assert_eq!((kept(&dir, ACCOUNTS), failed(&control)), (Some(accounts), 1));

    for (less, expected) in [(0, (Some(captures.clone()), false)), (1, (None, true))] {
        let (dir, control) = control_within(Bounds {
            publish_interval: std::time::Duration::ZERO,
            capture_file_bytes: captures.len() as u64 - less,
            ..Bounds::default()
        });
        control.set_world(&registry(&[MESH]));
        control.set_report("node-a", word(Proof::Proven));
        control.set_world(&registry(&[MESH]));
        assert_eq!((kept(&dir, CAPTURE_STATES), failed(&control) > 0), expected);
        assert_eq!(control.status()["pods"]["shop/web"], "proven", "in force all the same");
    }
}

#[tokio::test]
async fn rejections_are_shown_up_to_a_bound_and_all_counted() {
    let (_dir, control) = control_within(Bounds {
        rejections: 2,
        ..Bounds::default()
    });
    control.set_world(&registry(&[MESH, "{", "[", "}"]));
    let shown = control.status()["rejected_manifests"].as_array().map(Vec::len);
    assert_eq!(shown, Some(2));
    let counted = control.metrics.text().expect("metrics");
    assert!(
        counted.contains("mesh_control_manifests_rejected{reason=\"syntax\"} 3"),
        "{counted}"
    );
}

#[tokio::test]
async fn what_services_ask_for_and_do_not_get_is_said_within_bounds() {
    let (_dir, control) = control(std::time::Duration::ZERO);
    let service = |n: usize| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: s{n}, namespace: shop}}\n\
             spec: {{trafficDistribution: PreferClose}}\n---\n"
        )
    };
    let plain = "apiVersion: v1\nkind: Service\nmetadata: {name: plain, namespace: shop}\nspec: {sessionAffinity: ClientIP, internalTrafficPolicy: Local}\n---\n";
    control.set_world(&registry(&[&(service(1) + plain)]));
    let warnings = |control: &ControlPlane| control.status()["warnings"].as_array().expect("list").clone();
    let of_services: Vec<_> = (warnings(&control).into_iter())
        .filter(|warning| warning.as_str().is_some_and(|text| text.contains("Service shop/s1")))
        .collect();
    assert_eq!(of_services.len(), 1, "{of_services:?}");
    assert!(
        !warnings(&control)
            .iter()
            .any(|warning| warning.as_str().is_some_and(|text| text.contains("plain")))
    );
    let many: String = (0..=crate::limits::MAX_SERVICE_WARNINGS).map(service).collect();
    control.set_world(&registry(&[&many]));
    assert!(warnings(&control).len() <= crate::limits::MAX_SERVICE_WARNINGS + 2);
    let last = warnings(&control).pop().expect("a warning");
    assert!(last.as_str().is_some_and(|text| text.starts_with("more Services")), "{last}");
}

#[test]
fn nodes_that_are_gone_are_forgotten_at_the_bound() {
    let (_dir, control) = control(std::time::Duration::ZERO);
    control.with_node("connected", |status| status.discovery_streams = 1);
    for number in 1..MAX_NODES {
        control.with_node(&format!("gone-{number}"), |_| ());
    }
    let known = || control.status()["nodes"].as_object().expect("nodes").len();
    assert_eq!(known(), MAX_NODES);
    control.with_node("new", |_| ());
    assert_eq!(known(), 2);
    control.with_node("connected", |status| assert_eq!(status.discovery_streams, 1));
}
