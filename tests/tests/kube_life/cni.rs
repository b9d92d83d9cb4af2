//! A node without an agent, under a real kubelet: Pods of the mesh wait for one, and say so; all others start.

use anyhow::{Context as _, Result, ensure};
use mesh_tests::kube::shop::{MESH, PATIENCE, SHOP, get, until_proven};
use mesh_tests::kube::{Cluster, culvert, manifests};
use mesh_tests::poll::{self, SOON};
use serde_json::{Value, json};

use super::rollouts::{AGENT, AGENTS};
use super::{LABEL, expect_mesh};

/// Labelled, and its Pods start all the same.
const SOFT: &str = "soft";
/// What starts without an agent.
const OTHERS: [(&str, &str); 3] = [("default", "outsider"), ("kube-system", "system"), (SOFT, "relaxed")];
const WAITS: &str = "waits";
/// By it the plugin decides. As docs/DEPLOY.md names it.
const LIST: &str = "/etc/cni/net.d/culvert-namespaces";

pub fn without_agent(cluster: &mut Cluster) -> Result<()> {
    let kubectl = cluster.kubectl();
    kubectl.run(&["create", "namespace", SOFT])?;
    kubectl.run(&["label", "namespace", SOFT, LABEL, "culvert.dev/enrolment=best-effort"])?;
    poll::until_true("the plugin's list has both namespaces", PATIENCE, || {
        Ok(is_listed(&list(cluster)?))
    })?;
    let elsewhere = json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
        {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": [cluster.node(2).name()]}]},
    ]}}});
    let tried = place_agents(cluster, &elsewhere).and_then(|()| expect_closed(cluster));
    // Whatever became of it: the other checks need both agents.
    let back = place_agents(cluster, &Value::Null);
    let tried = tried.and(back).and_then(|()| expect_open(cluster));
    let gone = kubectl
        .delete(&pods())
        .and_then(|_| kubectl.run(&["delete", "namespace", SOFT, "--wait=false"]));
    tried.and(gone).map(drop)
}

/// Nobody uninstalls anything: the DaemonSet is for other nodes, by this affinity.
fn place_agents(cluster: &Cluster, affinity: &Value) -> Result<()> {
    let patch = json!({"spec": {"template": {"spec": {"affinity": affinity}}}}).to_string();
    cluster
        .kubectl()
        .run(&["-n", MESH, "patch", AGENT, "--type=merge", "--patch", &patch])?;
    cluster.kubectl().rolled_out(MESH, AGENT)
}

fn pods() -> String {
    let all = OTHERS.into_iter().chain([(SHOP, WAITS)]);
    all.map(|(namespace, name)| manifests::pod(namespace, name, 2, &format!("app: {name}"), "[sleep, inf]", ""))
        .collect()
}

fn list(cluster: &Cluster) -> Result<Value> {
    let text = cluster.node(2).run(&["cat", LIST], SOON)?.ok("the plugin's list")?;
    serde_json::from_str(&text).with_context(|| format!("the plugin's list: {text}"))
}

fn is_listed(list: &Value) -> bool {
    let namespaces = &list["namespaces"];
    namespaces[SHOP] == false && namespaces[SOFT] == true && namespaces["default"].is_null()
}

fn expect_closed(cluster: &Cluster) -> Result<()> {
    let (node, kubectl) = (cluster.node(2), cluster.kubectl());
    poll::until_true("the node's agent is gone", PATIENCE, || {
        let is_elsewhere = |pod: &Value| pod["spec"]["nodeName"] != node.name();
        let runs = node.run(&["pgrep", "-x", "mesh-agent"], SOON)?.status.success();
        Ok(!runs && cluster.pods(MESH, AGENTS)?.iter().all(is_elsewhere))
    })?;
    let networks = ["sh", "-c", "cat /etc/cni/net.d/*.conflist"];
    let networks = node.run(&networks, SOON)?.ok("the network's configuration")?;
    ensure!(
        networks.contains("\"mesh-cni\""),
        "the plugin went with the agent: {networks}"
    );
    let left = list(cluster)?;
    ensure!(is_listed(&left), "the agent has not left its list as it was: {left}");

    kubectl.apply(&pods())?;
    for (namespace, name) in OTHERS {
        kubectl.wait_for(namespace, "Ready", &[&format!("pod/{name}")])?;
        ensure!(
            culvert::capture(cluster, namespace, name)?.is_null(),
            "{namespace}/{name} is called captured on a node without an agent"
        );
    }
    let why = [
        "FailedCreatePodSandBox".to_owned(),
        format!("Pod {SHOP}/{WAITS} is to be in the mesh and cannot be enrolled: the mesh's agent on this node does not answer"),
        "culvert.dev/enrolment=best-effort".to_owned(),
    ];
    let mut said = String::new();
    poll::until_true("kubectl describe says why the Pod does not start", PATIENCE, || {
        said = kubectl.run(&["-n", SHOP, "describe", "pod", WAITS])?;
        Ok(why.iter().all(|words| said.contains(words)))
    })
    .with_context(|| said.clone())?;
    let pod = kubectl.get(&["-n", SHOP, "pod", WAITS])?;
    ensure!(
        pod["status"]["phase"] == "Pending" && pod["status"]["containerStatuses"][0]["started"] != true,
        "it has started without an agent: {}",
        pod["status"]
    );
    Ok(())
}

/// With an agent again.
fn expect_open(cluster: &Cluster) -> Result<()> {
    cluster.kubectl().wait_for(SHOP, "Ready", &[&format!("pod/{WAITS}")])?;
    until_proven(cluster, &[WAITS, "client", "near", "server"])?;
    // It was let go on without the mesh, and joins it as it runs.
    culvert::until_proven(cluster, SOFT, &["relaxed"])?;
    for (namespace, name) in OTHERS.into_iter().filter(|(namespace, _)| *namespace != SOFT) {
        ensure!(
            culvert::capture(cluster, namespace, name)?.is_null(),
            "{namespace}/{name} is captured"
        );
    }
    poll::until_true("the client is answered again", PATIENCE, || {
        Ok(get(cluster, "http://server/").is_ok())
    })?;
    expect_mesh(cluster)
}
