//! The claims about policy beyond one refusal: what takes no plaintext, what is alive, what is only tried; and services.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};

use super::AT_ONCE;
use crate::access_log::text;
use crate::app::ECHO_PORT;
use crate::manifests::{MESHED, ROOT_NAMESPACE, SERVICE_PORT, mesh_config, policy, principal, service};
use crate::mesh::Mesh;
use crate::poll;
use crate::topology::NodeName;

pub(super) fn service_address(mesh: &mut Mesh) -> Result<Vec<String>> {
    let (v4, v6) = (Ipv4Addr::new(10, 96, 0, 20), Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 0x20));
    mesh.add_service(NodeName::One, "echo", &service("echo", v4, v6, "app: server"))?;
    let log = mesh.access_log(NodeName::One);
    let mut evidence = Vec::new();
    for address in [IpAddr::from(v4), v6.into()] {
        let wanted = SocketAddr::new(address, SERVICE_PORT).to_string();
        let position = log.position();
        let attempt = mesh.app.connect(&mesh.pod("client").place(), address, SERVICE_PORT)?;
        let peer = attempt.expect_ok()?.report["peer"].as_str().unwrap_or_default().to_owned();
        ensure!(peer == wanted, "expected getpeername to say {wanted}, it said {peer}");
        let line = log.wait_for(
            position,
            &[("path", "tunnel"), ("destination_workload", "server")],
            poll::SOON,
        )?;
        evidence.push(format!(
            "getpeername says {peer}; {} was reached at {}",
            text(&line, "destination_service"),
            text(&line, "destination_address")
        ));
    }
    mesh.registry.remove("echo.yaml")?;
    Ok(evidence)
}

pub(super) fn strict(mesh: &mut Mesh) -> Result<Vec<String>> {
    let addresses = mesh.pod("server").addresses();
    let attempt = |mesh: &Mesh, from: &str, address| mesh.app.connect(&mesh.pod(from).place(), address, ECHO_PORT);
    attempt(mesh, "outsider", addresses[0])?
        .expect_ok()
        .context("before STRICT")?;
    mesh.registry
        .write("mesh-config.yaml", &mesh_config(ROOT_NAMESPACE, "{ mtls: Strict }"))?;
    let mut evidence = Vec::new();
    for address in addresses {
        mesh.wait_for_outcome("outsider", address, ECHO_PORT, false)?;
        let log = mesh.access_log(NodeName::Two);
        let position = log.position();
        attempt(mesh, "outsider", address)?.expect_refused(AT_ONCE)?;
        let line = log.wait_for(position, &[("path", "plaintext"), ("result", "refused")], poll::SOON)?;
        evidence.push(format!("outsider → {address}: refused, reason: {}", text(&line, "reason")));
        attempt(mesh, "client", address)?.expect_ok().context("the meshed client")?;
        evidence.push(format!("client → {address}: works, by mutual TLS"));
    }
    mesh.registry.remove("mesh-config.yaml")?;
    mesh.wait_for_outcome("outsider", addresses[0], ECHO_PORT, true)?;
    Ok(evidence)
}

pub(super) fn live_cut(mesh: &mut Mesh) -> Result<Vec<String>> {
    let server: IpAddr = mesh.pod("server").v4.into();
    let mut denied = mesh.app.chat(&mesh.pod("client").place(), server)?;
    let mut unaffected = mesh.app.chat(&mesh.pod("local").place(), server)?;
    for chat in [&mut denied, &mut unaffected] {
        let answer = chat.ask("before", poll::SOON)?;
        ensure!(answer == "before", "expected an echo, saw {answer}");
    }
    let rule = format!("[{{ from: [{{ principals: [{}] }}] }}]", principal("client"));
    let log = mesh.access_log(NodeName::Two);
    let position = log.position();
    let start = Instant::now();
    mesh.registry
        .write("live-deny.yaml", &policy("live-deny", "server", "Deny", &rule))?;
    let end = denied.hear(poll::SOON).context("the open connection is not cut")?;
    ensure!(end.contains("ConnectionReset"), "expected a reset, the client said {end}");
    let mut evidence = vec![format!(
        "the client's open connection was reset {:?} after the file was written",
        start.elapsed()
    )];
    let line = log.wait_for(position, &[("reason", "cut_by_policy")], poll::SOON)?;
    evidence.push(format!(
        "the access log: {}, policy: {}",
        text(&line, "reason"),
        text(&line, "policy")
    ));
    let answer = unaffected.ask("still here", poll::SOON)?;
    ensure!(answer == "still here", "expected an echo, saw {answer}");
    evidence.push(format!("on the connection of the Pod local: {answer}"));
    mesh.registry.remove("live-deny.yaml")?;
    mesh.wait_for_outcome("client", server, ECHO_PORT, true)?;
    Ok(evidence)
}

pub(super) fn dry_run(mesh: &mut Mesh) -> Result<Vec<String>> {
    let server: IpAddr = mesh.pod("server").v4.into();
    let rule = format!("[{{ from: [{{ principals: [{}] }}] }}]", principal("client"));
    let (name, metric) = (format!("{MESHED}/trial"), "mesh_policy_dry_run_matches_total");
    let counted = || mesh.metric(NodeName::Two, metric, &[("policy", &name)]);
    let before = counted()?;
    let manifest = policy("trial", "server", "Deny", &rule) + "  mode: DryRun\n";
    mesh.registry.write("trial.yaml", &manifest)?;
    let log = mesh.access_log(NodeName::Two);
    let position = log.position();
    poll::until_true("the dry run is counted", poll::SOON, || {
        let attempt = mesh.app.connect(&mesh.pod("client").place(), server, ECHO_PORT)?;
        attempt.expect_ok().context("a dry run enforces nothing")?;
        Ok(counted()? > before)
    })?;
    let logged = format!("[\"{name}\"]");
    log.wait_for(position, &[("result", "ok"), ("dry_run_policies", &logged)], poll::SOON)?;
    mesh.registry.remove("trial.yaml")?;
    Ok(vec![
        format!("{metric}{{policy=\"{name}\"}} rose, and the client got through"),
        format!("the access log: result: ok, dry_run_policies: {logged}"),
    ])
}
