//! The claim about an agent that another one takes over from.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

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
    Ok(evidence)
}

/// A second agent on the node's folder takes over, and the first one ends.
fn restart(mesh: &mut Mesh, node: NodeName) -> Result<String> {
    let before = mesh.take_agent(node)?;
    let id = before.id();
    mesh.launch_agent(node)?;
    let status = before.wait(PATIENTLY).context("the agent of before does not end")?;
    ensure!(status.success(), "the agent of before ended with {status}");
    mesh.wait_until_ready(node)?;
    let new = mesh.agent_id(node).context("an agent runs")?;
    Ok(format!(
        "the agent of {}: process {new} took over from {id}, which ended once its connections had",
        node.as_str()
    ))
}
