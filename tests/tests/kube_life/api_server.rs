//! The API server away: what is known goes on, and what changes meanwhile counts when it is back.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::kube::Cluster;
use mesh_tests::kube::load::{Inside, Load, inside};
use mesh_tests::kube::shop::{MESH, PATIENCE, get, until_proven};
use mesh_tests::poll::{self, SOON};

use super::{agent_page, expect_mesh, page, report};

const READY: &str = "/healthz/ready";
const AGENT_READY: u16 = 15021;
const CONTROL_PAGES: u16 = 15014;
/// Longer than watches need to notice, certificates' and reviews' short timers to pass, and far shorter than an agent can do without.
const OUTAGE: Duration = Duration::from_secs(120);
/// Every watch and every lease has been begun again.
const RETURN: Duration = Duration::from_secs(10);
const DENY: &str = r"
apiVersion: culvert.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: no-client, namespace: shop}
spec:
  selector: {matchLabels: {app: server}}
  action: Deny
  rules: [{from: [{principals: [cluster.local/ns/shop/sa/client]}]}]
";

pub fn away(cluster: &mut Cluster) -> Result<()> {
    let controls = cluster.pods(MESH, "app.kubernetes.io/name=mesh-control")?;
    let controls = controls.iter().map(|pod| pod["status"]["podIP"].as_str()?.parse().ok());
    let controls: Vec<Ipv4Addr> = controls.collect::<Option<_>>().context("addresses of mesh-control")?;
    ensure!(controls.len() == 2, "expected two control planes, saw {controls:?}");
    let restarts = restarts_of_controls(cluster)?;
    // Found while there is somebody to ask.
    let client = inside(cluster, "client")?;
    cluster.stop_server();
    let during = during(cluster, &client, &controls);
    let return_of = Load::begin_in(cluster, client, "http://server/")?;
    cluster.resume_server()?;
    during?;
    for number in 1..=cluster.nodes().len() {
        cluster.wait_until_ready(&format!("node-{number}"))?;
    }
    std::thread::sleep(RETURN);
    let counted = return_of.end(cluster)?;
    report(cluster, "the API server's return", &counted);
    counted.none_failed("the API server's return")?;
    cluster.kubectl().rolled_out(MESH, "deployment/mesh-control")?;
    let more = restarts_of_controls(cluster)? - restarts;
    ensure!(more == 1, "the control plane that was killed was started {more} times");
    cluster.kubectl().apply(DENY)?;
    poll::until_true("the client is denied", PATIENCE, || {
        Ok(get(cluster, "http://server/").is_err())
    })?;
    cluster.kubectl().delete(DENY)?;
    poll::until_true("the client is let in again", PATIENCE, || {
        Ok(get(cluster, "http://server/").is_ok())
    })?;
    until_proven(cluster, &["client", "near", "server"])?;
    expect_mesh(cluster)
}

fn restarts_of_controls(cluster: &Cluster) -> Result<u64> {
    let pods = cluster.pods(MESH, "app.kubernetes.io/name=mesh-control")?;
    let restarts = pods
        .iter()
        .map(|pod| pod["status"]["containerStatuses"][0]["restartCount"].as_u64());
    restarts.sum::<Option<u64>>().context("restarts of mesh-control")
}

fn during(cluster: &Cluster, client: &Inside, controls: &[Ipv4Addr]) -> Result<()> {
    ensure!(
        !cluster.kubectl().output(&["get", "--raw", "/readyz"])?.status.success(),
        "the API server answers"
    );
    let far = Load::begin_in(cluster, client.clone(), "http://server/")?;
    let near = Load::begin_in(cluster, client.clone(), "http://near/")?;
    // The kubelet starts it again. It waits for the API server then, and is left to wait.
    let killed = cluster.node(1).run(&["sh", "-c", "kill -9 $(pgrep -x mesh-control)"], SOON)?;
    killed.ok("killing a control plane")?;
    std::thread::sleep(OUTAGE);
    for node in cluster.nodes() {
        agent_page(node, AGENT_READY, READY)?;
    }
    // The one that was killed does not listen before it has the root.
    let ready = controls.iter().filter(|address| {
        let page = page(cluster.node(1), **address, CONTROL_PAGES, READY);
        page.is_ok_and(|page| page.status == 200)
    });
    let ready = ready.count();
    ensure!(ready == 1, "{ready} of two control planes are ready, of which one was killed");
    for (what, load) in [("to the other node", far), ("within the node", near)] {
        let counted = load.end(cluster)?;
        report(cluster, &format!("the API server away for {OUTAGE:?}, {what}"), &counted);
        counted.none_failed(what)?;
    }
    // An agent that is killed now is started again by the kubelet, and has nobody to ask either.
    let load = Load::begin_in(cluster, client.clone(), "http://server/")?;
    let node = cluster.node(2);
    node.run(&["sh", "-c", "kill -9 $(pgrep -x mesh-agent)"], SOON)?
        .ok("killing the agent")?;
    poll::until_true("the agent is there again", PATIENCE, || {
        Ok(page(node, Ipv4Addr::LOCALHOST, AGENT_READY, READY).is_ok_and(|page| page.status == 200))
    })?;
    let said = page(node, Ipv4Addr::LOCALHOST, AGENT_READY, READY)?.body;
    println!("an agent that was killed meanwhile says: {}", said.trim());
    report(cluster, "an agent killed while the API server is away", &load.end(cluster)?);
    let after = Load::begin_in(cluster, client.clone(), "http://server/")?;
    std::thread::sleep(Duration::from_secs(3));
    let counted = after.end(cluster)?;
    report(cluster, "after that", &counted);
    counted.none_failed("the time after an agent was killed without an API server")
}
