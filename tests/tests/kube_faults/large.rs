//! Objects as large as whoever may make objects can make them.

use anyhow::{Context as _, Result, ensure};
use mesh_control::limits::MAX_ANSWER_BYTES;

use crate::Bench;
use crate::control::Control;

/// Of each Pod; etcd takes 1.5 MiB.
const BYTES: usize = 1 << 20;
/// So many that the first page of Pods is beyond its bound.
const PODS: usize = MAX_ANSWER_BYTES / BYTES + 4;

pub fn objects(bench: &mut Bench) -> Result<()> {
    let kubectl = bench.server.kubectl();
    kubectl.apply(
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: large}\n---\n\
         apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: large, namespace: large}\n",
    )?;
    let folder = tempfile::tempdir()?;
    for n in 0..PODS {
        let pod = serde_json::json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": format!("large-{n}"), "namespace": "large"},
            "spec": {
                "serviceAccountName": "large",
                "containers": [{"name": "c", "image": "nowhere.test/app:1", "args": ["x".repeat(BYTES)]}],
            },
        });
        std::fs::write(folder.path().join(format!("{n}.json")), pod.to_string())?;
    }
    kubectl.run(&["create", "--validate=false", "-f", folder.path().to_str().context("a path")?])?;
    // A replica that starts now reads nothing else before it serves.
    let control = Control::start(bench)?;
    let snapshot = control.control().snapshot();
    let read = snapshot.pods.values().filter(|pod| pod.namespace == "large").count();
    ensure!(read == PODS, "{read} of {PODS} large Pods were read");
    ensure!(
        snapshot.pods.values().any(|pod| pod.namespace == "shop"),
        "what comes after them was not read"
    );
    ensure!(control.lists_of("Pod") == 1, "the list began anew");
    kubectl.forget_pods("large")
}
