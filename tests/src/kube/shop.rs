//! Some Pods on a [`Cluster`] that ask one another, and the mesh around them: what more than one suite begins with.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::remains::Remains;
use super::{Cluster, culvert, manifests};
use crate::wire::Recorder;
use crate::{poll, readme, suite};

pub const MESH: &str = culvert::NAMESPACE;
pub const SHOP: &str = "shop";
/// Images are started, certificates signed, captures proven, and written to the API server.
pub const PATIENCE: Duration = Duration::from_secs(120);

#[must_use]
pub fn with_logs(cluster: &Cluster, error: anyhow::Error) -> anyhow::Error {
    culvert::say_logs(cluster);
    let pods = cluster.kubectl().run(&["-n", SHOP, "describe", "pods"]);
    suite::say(&pods.unwrap_or_default());
    cluster.with_logs(error)
}

/// Before the mesh is installed: the namespace, a client and a server on node 1, and a server on node 2.
///
/// # Errors
/// They do not start.
pub fn deploy(cluster: &Cluster) -> Result<()> {
    let namespace = format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {SHOP}}}\n---\n");
    let manifests = namespace + &pod("client", 1, "[sleep, inf]") + &server("near", 1) + &server("server", 2);
    cluster.kubectl().apply(&manifests)?;
    let pods = ["pod/client", "pod/near", "pod/server"];
    cluster.kubectl().wait_for(SHOP, "Ready", &pods)?;
    let before = Remains::of(cluster, &["client", "near", "server"])?;
    Ok(std::fs::write(before_file(cluster), serde_json::to_vec(&before)?)?)
}

/// Of nodes and Pods before the mesh came.
///
/// # Errors
/// [`deploy`] has not been.
pub fn before(cluster: &Cluster) -> Result<Remains> {
    Ok(serde_json::from_slice(&std::fs::read(before_file(cluster))?)?)
}

fn before_file(cluster: &Cluster) -> PathBuf {
    cluster.folder().join("before.json")
}

/// By docs/DEPLOY.md and the README, without Helm.
///
/// # Errors
/// It does not come up.
pub fn install(cluster: &Cluster) -> Result<()> {
    culvert::prepare(cluster)?;
    let said = run_readme(cluster, "rollout status daemonset/mesh-agent")?;
    ensure!(said.contains("successfully rolled out"), "{said}");
    Ok(())
}

/// As [`readme::run_block`].
///
/// # Errors
/// There is not just one, or it fails.
pub fn run_readme(cluster: &Cluster, with: &str) -> Result<String> {
    readme::run_block(cluster.kubectl(), &culvert::folder(cluster), with)
}

/// A Pod of a service account of its own.
#[must_use]
pub fn pod(name: &str, node: u8, command: &str) -> String {
    manifests::pod(SHOP, name, node, &format!("app: {name}"), command, "")
}

/// A Pod that answers at 8080 and 9000, and its Service.
#[must_use]
pub fn server(name: &str, node: u8) -> String {
    let command = format!(r#"[mesh-test-app, serve, {name}, "8080", "9000"]"#);
    pod(name, node, &command)
        + &format!(
            r#"
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {SHOP}}}
spec:
  selector: {{app: {name}}}
  ipFamilyPolicy: RequireDualStack
  ports: [{{name: http, port: 80, targetPort: 8080}}]
---
"#
        )
}

/// As [`culvert::capture`], of a Pod of [`SHOP`].
///
/// # Errors
/// There is no such Pod.
pub fn capture(cluster: &Cluster, pod: &str) -> Result<Value> {
    culvert::capture(cluster, SHOP, pod)
}

/// As [`culvert::until_proven`], of Pods of [`SHOP`].
///
/// # Errors
/// One is not in time.
pub fn until_proven(cluster: &Cluster, pods: &[&str]) -> Result<()> {
    culvert::until_proven(cluster, SHOP, pods)
}

/// Of a Service: by it a connection needs no DNS, whose Pods may be on the node that something happens to.
///
/// # Errors
/// There is none.
pub fn service_address(cluster: &Cluster, service: &str) -> Result<String> {
    let service = cluster.kubectl().get(&["-n", SHOP, "service", service])?;
    Ok(service["spec"]["clusterIP"].as_str().context("a cluster address")?.to_owned())
}

/// What the client is answered.
///
/// # Errors
/// It is not answered.
pub fn get(cluster: &Cluster, url: &str) -> Result<String> {
    let output = cluster.kubectl().exec(SHOP, "client", &["mesh-test-app", "get", url])?;
    output.ok(&format!("GET {url} by the client's Pod"))
}

/// The access-log lines of both agents, of a connection to this Pod.
///
/// # Errors
/// The logs cannot be read.
pub fn lines_of(cluster: &Cluster, pod: &str) -> Result<Vec<Value>> {
    culvert::access_log(cluster, |line| line["destination_workload"] == pod)
}

/// Waits until both ends say of a connection from the client to this Pod that it was mutual TLS, and between whom.
///
/// # Errors
/// Not in time.
pub fn until_mutual_tls(cluster: &Cluster, server: &str) -> Result<()> {
    for direction in ["outbound", "inbound"] {
        poll::until_true(&format!("{direction} to {server} by mutual TLS"), PATIENCE, || {
            Ok(lines_of(cluster, server)?.iter().any(|line| {
                line["direction"] == direction
                    && line["result"] == "ok"
                    && line["connection_security_policy"] == "mutual_tls"
                    && line["source_principal"] == format!("spiffe://cluster.local/ns/{SHOP}/sa/client")
                    && line["destination_principal"] == format!("spiffe://cluster.local/ns/{SHOP}/sa/{server}")
            }))
        })?;
    }
    Ok(())
}

/// Waits until the status of a policy says of this generation that it is in force on both nodes, for one workload.
///
/// # Errors
/// Not in time: what it says.
pub fn until_enforced(cluster: &Cluster, policy: &str, generation: u64) -> Result<()> {
    let mut status = Value::Null;
    poll::until_true("both nodes enforce it", PATIENCE, || {
        let policy = cluster.kubectl().get(&["-n", SHOP, "authorizationpolicy", policy])?;
        status = policy["status"].clone();
        Ok(status["nodesEnforcing"] == 2 && status["workloadsSelected"] == 1 && status["observedGeneration"] == generation)
    })
    .with_context(|| format!("{policy}: {status}"))
}

/// Whether what the client asks for can be read on the wire between the nodes, and what it was answered.
///
/// # Errors
/// Nothing can be recorded.
pub fn is_on_the_wire(cluster: &Cluster, host: &str) -> Result<(bool, Result<String>)> {
    let marker = format!("marker-{:016x}", rand::random::<u64>());
    let recorder = Recorder::start(cluster.node(1).netns(), "eth0")?;
    let answer = get(cluster, &format!("http://{host}/{marker}"));
    let recording = recorder.finish()?;
    ensure!(recording.frames > 0, "nothing was recorded");
    Ok((recording.contains(marker.as_bytes()), answer))
}
