//! The claim about an agent that another one takes over from.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::mesh::Mesh;
use crate::poll;
use crate::process::Process;
use crate::topology::NodeName;

const LOAD_PORT: u16 = 9900;
/// So many more must have worked after each restart.
const MORE: u64 = 100;
/// An agent ends when its last connection has.
const PATIENTLY: Duration = Duration::from_secs(40);

pub(super) fn graceful(mesh: &mut Mesh) -> Result<Vec<String>> {
    let folder = mesh.topology.folder().to_owned();
    let serve = mesh
        .pod("server")
        .place()
        .command(mesh.app.binary(), &["load-serve", &LOAD_PORT.to_string()])?;
    let _server = Process::start("the load's server", serve, folder.join("load-server.log"))?;
    let address = SocketAddr::new(mesh.pod("server").v4.into(), LOAD_PORT);
    let (app, client) = (mesh.app.clone(), mesh.pod("client").place());
    poll::until_true("the load's server answers", poll::SOON, || {
        Ok(app.connects(&client, address, 1).is_ok())
    })?;
    let logs = NodeName::ALL.map(|node| mesh.access_log(node));
    let positions = logs.each_ref().map(|log| log.position());
    let (worked, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let start = Instant::now();
    let mut evidence = Vec::new();
    std::thread::scope(|scope| -> Result<()> {
        let load = scope.spawn(|| -> Result<()> {
            while !over.load(Ordering::Relaxed) {
                let made = app.connects(&client, address, 25).context("a connection of the load")?;
                worked.fetch_add(made, Ordering::Relaxed);
            }
            Ok(())
        });
        let restarts = NodeName::ALL.into_iter().try_for_each(|node| {
            evidence.push(restart(mesh, node)?);
            let before = worked.load(Ordering::Relaxed);
            poll::until_true("connections are made", PATIENTLY, || {
                Ok(load.is_finished() || worked.load(Ordering::Relaxed) >= before + MORE)
            })
        });
        over.store(true, Ordering::Relaxed);
        let load = load.join().map_err(|_| anyhow::anyhow!("the load's thread panicked"))?;
        // A failed connection says more than what it makes of the rest.
        load.and(restarts)
    })?;
    let worked = worked.into_inner();
    ensure!(worked >= 2 * MORE, "only {worked} connections were made");
    evidence.push(format!(
        "{worked} connections from client to {address} meanwhile, in {:.1} s, each with a message there and back: 0 failed",
        start.elapsed().as_secs_f32()
    ));
    let lines = logs
        .iter()
        .zip(positions)
        .flat_map(|(log, position)| log.since(position, &[]));
    let (ok, other): (Vec<Value>, Vec<Value>) = lines.partition(|line| line["result"] == "ok");
    ensure!(other.is_empty(), "expected nothing but ok in the access logs, saw {other:?}");
    evidence.push(format!(
        "both nodes' access logs meanwhile: {} lines, each with result: ok",
        ok.len()
    ));
    let labels = [("reporter", "source"), ("source_workload", "client")];
    let count = |name| mesh.metric(NodeName::One, name, &labels);
    let (opened, failed) = (
        count("mesh_tcp_connections_opened_total")?,
        count("mesh_tcp_connections_failed_total")?,
    );
    ensure!(
        opened > 0.0 && failed == 0.0,
        "expected no failure, the new agent counts {failed} beside {opened}"
    );
    evidence.push(format!(
        "the new agent's mesh_tcp_connections_opened_total of the client: {opened}; its mesh_tcp_connections_failed_total: 0"
    ));
    Ok(evidence)
}

/// A second agent on the node's folder takes over, and the first one ends.
fn restart(mesh: &mut Mesh, node: NodeName) -> Result<String> {
    let log = mesh.topology.node(node).folder.join("mesh-agent.log");
    let position = usize::try_from(std::fs::metadata(&log)?.len())?;
    let before = mesh.take_agent(node)?;
    let id = before.id();
    mesh.launch_agent(node)?;
    let status = before.wait(PATIENTLY).context("the agent of before does not end")?;
    ensure!(status.success(), "the agent of before ended with {status}");
    mesh.wait_until_ready(node)?;
    let new = mesh.agent_id(node).context("an agent runs")?;
    let bytes = std::fs::read(&log)?;
    let said = String::from_utf8_lossy(bytes.get(position..).context("its log is there")?).into_owned();
    let line = said.lines().find(|line| line.contains("another agent has taken over"));
    Ok(format!(
        "the agent of {}, process {new} after {id}, whose log says: {}",
        node.as_str(),
        line.context("the agent of before says nothing of it")?
    ))
}
