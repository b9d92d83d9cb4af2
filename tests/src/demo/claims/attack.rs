//! The claims about who tries to get around the mesh.

use anyhow::{Context as _, Result, ensure};

use crate::access_log::text;
use crate::mesh::Mesh;
use crate::poll;
use crate::topology::NodeName;

const TUNNEL_PORT: u16 = 15008;
/// EPROTONOSUPPORT, what the kernel program answers.
const PROTOCOL_NOT_SUPPORTED: i32 = 93;

pub(super) fn multipath(mesh: &mut Mesh) -> Result<Vec<String>> {
    let (metric, labels) = ("mesh_capture_events_total", [("event", "refused_mptcp")]);
    let server = mesh.pod("server").v4.into();
    let before = mesh.metric(NodeName::One, metric, &labels)?;
    let outsider = mesh.app.mptcp(&mesh.pod("outsider").place(), server)?;
    let report = mesh.app.mptcp(&mesh.pod("client").place(), server)?;
    if outsider["socket"] == false {
        return Ok(vec!["this kernel has no multipath TCP, in the mesh or outside it".to_owned()]);
    }
    ensure!(
        report["socket"] == false && report["errno"] == PROTOCOL_NOT_SUPPORTED,
        "expected EPROTONOSUPPORT, the client saw {report}"
    );
    let after = mesh.metric(NodeName::One, metric, &labels)?;
    ensure!(
        after > before,
        "expected {metric} of refused_mptcp to rise from {before}, saw {after}"
    );
    Ok(vec![
        format!("the client asked for a multipath socket: {}", text(&report, "message")),
        "the Pod outside the mesh asked as well, and got one".to_owned(),
        format!("{metric}{{event=\"refused_mptcp\"}} rose from {before} to {after}"),
    ])
}

pub(super) fn agents_port(mesh: &mut Mesh) -> Result<Vec<String>> {
    let (metric, labels) = (
        "mesh_tunnel_handshakes_total",
        [("direction", "inbound"), ("result", "handshake_failed")],
    );
    let count = || mesh.metric(NodeName::Two, metric, &labels);
    let log = mesh.access_log(NodeName::Two);
    let mut evidence = Vec::new();
    for address in mesh.pod("server").addresses() {
        let (before, position) = (count()?, log.position());
        let attempt = mesh.app.connect(&mesh.pod("outsider").place(), address, TUNNEL_PORT)?;
        ensure!(
            !attempt.ok(),
            "expected that no plaintext is served there, saw {}",
            attempt.report
        );
        let fields = [("direction", "inbound"), ("reason", "handshake_failed")];
        let line = log
            .wait_for(position, &fields, poll::SOON)
            .context("the attempt is not in the log")?;
        let after = count()?;
        ensure!(
            after > before,
            "expected {metric} of handshake_failed to rise from {before}, saw {after}"
        );
        evidence.push(format!(
            "outsider → {address} port {TUNNEL_PORT}, in clear: {}; the access log: {} from {}, {}; {metric} rose from {before} to {after}",
            text(&attempt.report, "message"),
            text(&line, "result"),
            text(&line, "source_address"),
            text(&line, "reason"),
        ));
    }
    Ok(evidence)
}
