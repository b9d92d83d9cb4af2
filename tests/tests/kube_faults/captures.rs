//! What the writing of what agents have proven does to the API server.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hyper::Method;
use mesh_agent::discovery::report::{PodStatus, Proof};
use mesh_tests::kube::agent_client::Reported;
use mesh_tests::kube::faults::Target;
use mesh_tests::poll;
use serde_json::{Value, json};

use crate::Bench;
use crate::control::{Control, PATIENCE};

const NAMESPACE: &str = "captures";
/// So many that they take seconds at the pace.
const PODS: usize = 300;
/// In any second: 100 by the pace, and what of the four at once was sent before it and has come within it.
const MOST: usize = 120;

/// A node that has just joined says it of all its Pods at once. A slow machine only makes it fewer in a second.
pub fn pace(bench: &mut Bench) -> Result<()> {
    make(bench)?;
    let control = Control::start(bench)?;
    let agent = control.agent_with(NAMESPACE, &bench.token(NAMESPACE)?)?;
    let (pods, began) = (proven(bench)?, Instant::now());
    let reported = Reported::start(&agent, pods);
    poll::until_true("every one is written", PATIENCE, || {
        Ok(control.metrics.capture_writes.get() >= PODS as u64)
    })?;
    let took = began.elapsed();
    let is_proven = |pod: &&Value| pod["metadata"]["annotations"]["culvert.dev/capture"] == "proven";
    let written = pods_there(bench)?.iter().filter(is_proven).count();
    ensure!(written == PODS, "{written} of {PODS} are written");

    let seen = control.proxy.seen(Target::Everything, "pods", began);
    let patches = seen.iter().filter(|seen| seen.method == Method::PATCH);
    let mut times: Vec<Instant> = patches.map(|seen| seen.at).collect();
    times.sort_unstable();
    let within = |first: usize| {
        let from = times[first];
        times[first..].partition_point(|at| at.duration_since(from) < Duration::from_secs(1))
    };
    let most = (0..times.len()).map(within).max().unwrap_or_default();
    println!("{} writes in {took:.1?}, at most {most} in a second", times.len());
    ensure!(times.len() >= PODS, "the proxy has seen {} writes of {PODS}", times.len());
    ensure!(most <= MOST, "{most} writes came in one second");
    drop(reported);
    bench.server.kubectl().forget_pods(NAMESPACE)
}

/// Members of node-a.
fn make(bench: &Bench) -> Result<()> {
    let kubectl = bench.server.kubectl();
    kubectl.apply(&format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {NAMESPACE}, labels: {{culvert.dev/mesh: enabled}}}}\n---\n\
         apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: web, namespace: {NAMESPACE}}}\n"
    ))?;
    let pod = |n: usize| {
        json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": format!("pod-{n}"), "namespace": NAMESPACE},
            "spec": {
                "nodeName": "node-a", "serviceAccountName": "web",
                "containers": [{"name": "c", "image": "nowhere.test/app:1"}],
            },
        })
    };
    let list = json!({"apiVersion": "v1", "kind": "List", "items": (0..PODS).map(pod).collect::<Vec<_>>()});
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("pods.json");
    std::fs::write(&file, list.to_string())?;
    let file = file.to_str().context("a path")?;
    kubectl.run(&["create", "--validate=false", "-f", file]).map(drop)
}

fn pods_there(bench: &Bench) -> Result<Vec<Value>> {
    let mut list = bench.server.kubectl().get(&["-n", NAMESPACE, "pods"])?;
    serde_json::from_value(list["items"].take()).context("a list of Pods")
}

/// As their agent says it.
fn proven(bench: &Bench) -> Result<Vec<PodStatus>> {
    let status = |pod: &Value| -> Result<PodStatus> {
        let text = |key: &str| pod["metadata"][key].as_str().context("a text");
        Ok(PodStatus {
            uid: text("uid")?.into(),
            namespace: NAMESPACE.into(),
            name: text("name")?.into(),
            netns_cookie: 1,
            proof: Proof::Proven,
            reason: String::new(),
            problem: "",
        })
    };
    pods_there(bench)?.iter().map(status).collect()
}
