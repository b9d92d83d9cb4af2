//! A node loses its power, and has it again: what was in its kernel and below /run is gone, and so are its Pods' namespaces, while the API
//! server knows the Pods by the same uids.
//!
//! The nodes of the testbed share one kernel. What a reboot takes with it goes here with the node's bpffs and processes, which is looked
//! at; the boot id stays.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::kube::Cluster;
use mesh_tests::kube::load::Load;
use mesh_tests::kube::remains::KernelHalf;
use mesh_tests::kube::shop::{MESH, PATIENCE, SHOP, get, is_on_the_wire, lines_of, service_address, until_proven};
use mesh_tests::poll;

use super::{expect_mesh, report};

/// Attempts while the node is away.
const ATTEMPTS: usize = 3;

pub fn killed(cluster: &mut Cluster) -> Result<()> {
    let half = KernelHalf::of(cluster.node(2))?;
    let first = sandbox(cluster)?;
    let (server, near) = (service_address(cluster, "server")?, service_address(cluster, "near")?);
    let url = format!("http://{server}/");
    let near = Load::begin(cluster, "client", &format!("http://{near}/"))?;
    let far = Load::begin(cluster, "client", &url)?;
    cluster.node_mut(2).kill()?;
    // As its network would have it, too.
    link(cluster, "down")?;
    half.expect_none()?;
    let mut told = Vec::new();
    for _ in 0..ATTEMPTS {
        let (is_seen, answer) = is_on_the_wire(cluster, &server)?;
        ensure!(!is_seen, "in clear to a node that is away");
        let error = answer.err().context("a node that is away answers")?.to_string();
        // Its own patience, and so the mesh had none.
        ensure!(
            !error.contains("timed out") && !error.contains("temporarily unavailable"),
            "the client hung: {error}"
        );
        told.push(error);
    }
    println!(
        "while the node is away: {}",
        told.last().context("an attempt")?.lines().last().unwrap_or_default()
    );
    link(cluster, "up")?;
    cluster.node_mut(2).boot()?;
    cluster.wait_until_ready("node-2")?;
    cluster.kubectl().rolled_out(MESH, "daemonset/mesh-agent")?;
    poll::until_true("the server's Pod runs again", PATIENCE, || {
        Ok(sandbox(cluster)? != first && cluster.pods(SHOP, "app=server")?.iter().all(is_ready))
    })?;
    poll::until_true("the client is answered again", PATIENCE, || Ok(get(cluster, &url).is_ok()))?;
    let (near, far) = (near.end(cluster)?, far.end(cluster)?);
    report(cluster, "a node killed and back, within the other node", &near);
    report(cluster, "a node killed and back, to it", &far);
    near.none_failed("a power failure of another node")?;
    ensure!(far.failed > 0, "the node was never away");
    until_proven(cluster, &["client", "near", "server"])?;
    expect_mesh(cluster)?;
    let after = Load::begin(cluster, "client", "http://server/")?;
    std::thread::sleep(Duration::from_secs(3));
    let after = after.end(cluster)?;
    report(cluster, "after that", &after);
    after.none_failed("the time after the node was back")?;
    // The client never spoke in clear, whatever became of the node; nor did the server's agent take it so.
    let lines = lines_of(cluster, "server")?;
    ensure!(
        lines.iter().all(|line| line["connection_security_policy"] != "none"),
        "in clear: {lines:?}"
    );
    // There is another one, and nothing of the first.
    KernelHalf::of(cluster.node(2))?;
    half.expect_none()
}

/// The server's container: another one, in another namespace, after a reboot.
fn sandbox(cluster: &Cluster) -> Result<String> {
    let pod = cluster.kubectl().get(&["-n", SHOP, "pod", "server"])?;
    Ok(pod["status"]["containerStatuses"][0]["containerID"]
        .as_str()
        .unwrap_or_default()
        .to_owned())
}

fn is_ready(pod: &serde_json::Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    conditions
        .iter()
        .any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

/// The other end of the node's cable.
fn link(cluster: &Cluster, state: &str) -> Result<()> {
    let switch = cluster.id().name("control-plane");
    let status = Command::new("ip")
        .args(["-n", &switch, "link", "set", "node-2", state])
        .status()?;
    ensure!(status.success(), "ip link set node-2 {state}: {status}");
    Ok(())
}
