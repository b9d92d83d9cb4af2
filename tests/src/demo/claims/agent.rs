//! The claims about an agent itself: another one takes its place under load, and who has no right gets nothing from it.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::access_log::text;
use crate::app::ECHO_PORT;
use crate::mesh::Mesh;
use crate::poll;
use crate::process::Process;
use crate::topology::NodeName;

const LOAD_PORT: u16 = 9900;
const TUNNEL_PORT: u16 = 15008;
const THREADS: &str = "2";
const CONNECTIONS_A_RUN: &str = "50";
/// Made before, while, and after each agent is replaced.
const CONNECTIONS: usize = 200;
const RUN: Duration = Duration::from_secs(60);

pub(super) fn graceful_restart(mesh: &mut Mesh) -> Result<Vec<String>> {
    let (from, binary) = (mesh.pod("client").place(), mesh.app.binary().to_owned());
    let server = mesh.pod("server");
    let log = mesh.topology.folder().join("load-server.log");
    let serve = server.place().command(&binary, &["load-serve", &LOAD_PORT.to_string()])?;
    let address = SocketAddr::new(server.v4.into(), LOAD_PORT).to_string();
    let _server = Process::start("the load's server", serve, log.clone())?;
    poll::until_true("the load's server listens", poll::SOON, || {
        Ok(std::fs::read_to_string(&log)?.contains("serves"))
    })?;
    let logs = NodeName::ALL.map(|node| mesh.access_log(node));
    let positions = logs.each_ref().map(|log| log.position());

    let (worked, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let load = || -> Result<()> {
        let arguments = ["load-connects", &address, THREADS, CONNECTIONS_A_RUN];
        while !over.load(Ordering::Relaxed) {
            let report: Value = serde_json::from_str(&from.run(&binary, &arguments, RUN)?.ok("a connection of the load")?)?;
            let count = report["count"].as_u64().context("a count")?;
            worked.fetch_add(usize::try_from(count)?, Ordering::Relaxed);
        }
        Ok(())
    };
    let said = std::thread::scope(|scope| {
        let load = scope.spawn(load);
        let wait_for_more = || {
            let wanted = worked.load(Ordering::Relaxed) + CONNECTIONS;
            poll::until_true("more connections are made", poll::SOON, || {
                if load.is_finished() {
                    bail!("the load has ended");
                }
                Ok(worked.load(Ordering::Relaxed) >= wanted)
            })
        };
        let mut replace_both = || -> Result<Vec<String>> {
            let mut said = Vec::new();
            wait_for_more()?;
            for node in NodeName::ALL {
                said.push(replace(mesh, node)?);
                wait_for_more()?;
            }
            Ok(said)
        };
        let said = replace_both();
        over.store(true, Ordering::Relaxed);
        // A connection that failed says more than a wait for the next one.
        load.join().map_err(|_| anyhow::anyhow!("the load's thread panicked"))??;
        said
    })?;

    let lines = logs.iter().zip(positions).flat_map(|(log, at)| log.since(at, &[]));
    let not_ok: Vec<Value> = lines.filter(|line| line["result"] != "ok").collect();
    ensure!(not_ok.is_empty(), "expected that every connection is ok, saw {not_ok:?}");
    let labels = [("reporter", "source"), ("source_workload", "client")];
    let metric = |name| mesh.metric(NodeName::One, name, &labels);
    let (opened, failed) = (
        metric("mesh_tcp_connections_opened_total")?,
        metric("mesh_tcp_connections_failed_total")?,
    );
    ensure!(
        opened > 0.0 && failed == 0.0,
        "the new agent counts {opened} opened, {failed} failed"
    );
    let mut evidence = vec![format!(
        "{} connections, each with its answer, and 0 failures, while both agents were replaced",
        worked.load(Ordering::Relaxed)
    )];
    evidence.extend(said);
    evidence.push(format!(
        "the new agent's mesh_tcp_connections_opened_total of the client: {opened}, its _failed_total: {failed}"
    ));
    Ok(evidence)
}

/// Starts an agent where one runs, and waits until the one before has ended; its word on that.
fn replace(mesh: &mut Mesh, node: NodeName) -> Result<String> {
    let log = mesh.topology.node(node).folder.join("mesh-agent.log");
    let before = usize::try_from(std::fs::metadata(&log)?.len())?;
    let old = mesh.take_agent(node)?;
    let old_id = old.id();
    mesh.launch_agent(node)?;
    let new_id = mesh.agent_id(node).context("an agent was started")?;
    poll::until_true("the agent before is taken over", poll::SOON, || {
        Ok(line_after(&log, before, "another agent has taken over")?.is_some())
    })?;
    old.wait(poll::SOON).context("the agent before ends with its connections")?;
    mesh.wait_until_ready(node)?;
    let line = line_after(&log, before, "another agent has taken over")?.context("it was there")?;
    Ok(format!("{}, process {old_id} → {new_id}: {line}", node.as_str()))
}

fn line_after(log: &Path, position: usize, wanted: &str) -> Result<Option<String>> {
    let bytes = std::fs::read(log)?;
    let new = String::from_utf8_lossy(bytes.get(position..).unwrap_or_default());
    Ok(new.lines().find(|line| line.contains(wanted)).map(str::to_owned))
}

pub(super) fn attacks(mesh: &mut Mesh) -> Result<Vec<String>> {
    let mut evidence = Vec::new();
    let (client, outsider) = (mesh.pod("client").place(), mesh.pod("outsider").place());
    for address in mesh.pod("server").addresses() {
        // Past the sockets that the agent redirects. A kernel that has none for anybody refuses for another reason.
        if mesh.app.mptcp(&outsider, address)?["socket"] == true {
            let report = mesh.app.mptcp(&client, address)?;
            ensure!(report["socket"] == false, "expected no multipath socket, saw {report}");
            evidence.push(format!(
                "client → {address} by multipath TCP, past the capture: {}",
                text(&report, "message")
            ));
        }

        let labels = [("direction", "inbound"), ("result", "handshake_failed")];
        let counted = || mesh.metric(NodeName::Two, "mesh_tunnel_handshakes_total", &labels);
        let log = mesh.access_log(NodeName::Two);
        let (before, position) = (counted()?, log.position());
        let attempt = mesh.app.connect(&outsider, address, TUNNEL_PORT)?;
        ensure!(
            !attempt.ok() && attempt.report["step"] == "echo",
            "expected that the tunnel's port takes nothing in clear, saw {}",
            attempt.report
        );
        let fields = [("direction", "inbound"), ("reason", "handshake_failed")];
        let line = log.wait_for(position, &fields, poll::SOON)?;
        poll::until_true("the handshake is counted", poll::SOON, || Ok(counted()? > before))?;
        evidence.push(format!(
            "outsider → {} in clear, past STRICT or any policy: the access log: {}, {}",
            SocketAddr::new(address, TUNNEL_PORT),
            text(&line, "result"),
            text(&line, "reason")
        ));
        evidence.push(format!(
            "mesh_tunnel_handshakes_total{{result=\"handshake_failed\"}}: {before} → {}",
            counted()?
        ));
        mesh.app
            .connect(&client, address, ECHO_PORT)?
            .expect_ok()
            .context("the mesh goes on")?;
    }
    Ok(evidence)
}
