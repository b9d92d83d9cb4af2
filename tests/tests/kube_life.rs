//! The mesh on a real cluster, installed with Helm, while things happen to it: an API server that is away, rollouts that fail half-way,
//! another root, a node without an agent, addresses that change hands, nodes that lose their power, and its end. Each says how many
//! new connections failed meanwhile.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

#[path = "kube_life/api_server.rs"]
mod api_server;
#[path = "kube_life/cni.rs"]
mod cni;
#[path = "kube_life/node.rs"]
mod node;
#[path = "kube_life/removal.rs"]
mod removal;
#[path = "kube_life/reuse.rs"]
mod reuse;
#[path = "kube_life/rollouts.rs"]
mod rollouts;
#[path = "kube_life/roots.rs"]
mod roots;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;

use anyhow::{Result, ensure};
use mesh_tests::http::{self, Response};
use mesh_tests::kube::load::Counted;
use mesh_tests::kube::shop::{SHOP, capture, deploy, is_on_the_wire, until_proven, with_logs};
use mesh_tests::kube::{Cluster, Node, culvert, helm};
use mesh_tests::suite;
use serde_json::Value;

/// Of the access log, where a connection failed.
const LAST_LINES: usize = 3;
const LABEL: &str = "culvert.dev/mesh=enabled";

fn main() -> ExitCode {
    suite::run(
        "kube_life",
        || {
            helm::program()?;
            let cluster = Cluster::start(2)?;
            let ready = deploy(&cluster)
                .and_then(|()| helm::install(&cluster, &[]))
                .and_then(|()| join(&cluster));
            match ready {
                Ok(()) => Ok(cluster),
                Err(error) => Err(with_logs(&cluster, error)),
            }
        },
        with_logs,
        &[
            ("an_api_server_that_is_away_fails_no_connection", api_server::away),
            (
                "a_rollout_that_fails_half_way_fails_no_connection",
                rollouts::fail_before_they_serve,
            ),
            (
                "who_was_taken_over_from_serves_again_when_its_successor_fails",
                rollouts::fail_once_they_serve,
            ),
            (
                "a_root_is_replaced_and_breaks_no_connection_before_the_former_one_is_retired",
                roots::replaced,
            ),
            ("pods_of_the_mesh_alone_wait_where_no_agent_is", cni::without_agent),
            ("an_address_that_changes_hands_is_never_taken_for_who_had_it", reuse::address),
            ("a_node_that_lost_its_power_comes_back", node::killed),
            ("pods_leave_and_join_under_traffic", removal::leave_and_join),
            (
                "helm_uninstall_leaves_nodes_and_running_pods_as_they_were",
                removal::uninstall,
            ),
        ],
    )
}

fn join(cluster: &Cluster) -> Result<()> {
    cluster.kubectl().run(&["label", "--overwrite", "namespace", SHOP, LABEL])?;
    until_proven(cluster, &["client", "near", "server"])?;
    expect_mesh(cluster)
}

/// What the client asks the other node for is answered, and nobody can read it on the way.
fn expect_mesh(cluster: &Cluster) -> Result<()> {
    let (is_seen, answer) = is_on_the_wire(cluster, "server")?;
    ensure!(answer?.starts_with("server=server "), "another server answered");
    ensure!(!is_seen, "what the client says can be read between the nodes");
    ensure!(capture(cluster, "server")? == "proven", "the server is not proven");
    Ok(())
}

fn page(node: &Node, address: Ipv4Addr, port: u16, path: &str) -> Result<Response> {
    node.netns().run(|| http::request(SocketAddr::from((address, port)), path))
}

/// Of a node's agent.
fn agent_page(node: &Node, port: u16, path: &str) -> Result<String> {
    let Response { status, body, .. } = page(node, Ipv4Addr::LOCALHOST, port, path)?;
    ensure!(status == 200, "{}: its agent: {status} {body}", node.name());
    Ok(body)
}

fn report(cluster: &Cluster, what: &str, counted: &Counted) {
    println!("{what}: {} connections, {} failed", counted.made, counted.failed);
    if counted.failed > 0 {
        let some = counted.errors.lines().take(3).collect::<Vec<_>>().join(" | ");
        println!("  of the errors: {some}");
        let lines = culvert::access_log(cluster, |line| line["result"] != "ok").unwrap_or_default();
        let of_connections = lines.iter().filter(|line| !line["direction"].is_null());
        let mut last: Vec<Value> = of_connections.cloned().collect();
        last.sort_by_key(|line| line["time"].to_string());
        last.drain(..last.len().saturating_sub(LAST_LINES));
        let mut reasons = BTreeMap::<String, usize>::new();
        for line in lines {
            *reasons
                .entry(format!("{} {}", line["direction"], line["reason"]))
                .or_default() += 1;
        }
        println!("  what agents have refused for, in five minutes: {reasons:?}");
        for line in last {
            println!("  the last: {line}");
        }
    }
}
