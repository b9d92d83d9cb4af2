//! Connections that are open while policies change and service accounts are deleted.

use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::app::ECHO_PORT;
use mesh_tests::manifests::{MESHED, policy, principal, spiffe_id};
use mesh_tests::mesh::Mesh;
use mesh_tests::poll::{self, SOON};
use mesh_tests::topology::NodeName;

use crate::{QUICKLY, open};

const CHANGES: usize = 100;
/// Each of these changes cuts somebody, so that the changes are seen to be enforced and not only written.
const CUTS_EVERY: usize = 10;

pub fn deleted_account(mesh: &mut Mesh) -> Result<()> {
    let manifest = std::fs::read_to_string(mesh.registry.folder().join("pod-client.yaml"))?;
    let (account, pod) = manifest.split_once("---\n").context("a service account and a Pod")?;
    ensure!(
        account.contains("kind: ServiceAccount") && pod.contains("kind: Pod"),
        "{manifest}"
    );
    let cuts = |mesh: &Mesh| -> Result<f64> {
        let of = |node| mesh.metric(node, "mesh_policy_cut_total", &[("policy", "_identity_revoked")]);
        Ok(of(NodeName::One)? + of(NodeName::Two)?)
    };
    for address in mesh.pod("server").forms() {
        let chat = open(mesh, "client", address)?;
        let mut unaffected = open(mesh, "local", address)?;
        let logs = NodeName::ALL.map(|node| mesh.access_log(node));
        let positions = logs.each_ref().map(|log| log.position());
        let before = cuts(mesh)?;

        mesh.registry.write("pod-client.yaml", pod)?;
        let end = chat.hear(SOON).context("the client is not told")?;
        ensure!(end.contains("ConnectionReset"), "expected a reset, the client said {end:?}");
        // Either end may be first; the other one then sees a connection that ended.
        poll::until_true("an access log says why", SOON, || {
            let fields = [("result", "failed"), ("reason", "cut_by_revocation")];
            let lines = logs.iter().zip(positions).map(|(log, position)| log.since(position, &fields));
            Ok(lines
                .flatten()
                .any(|line| line["source_principal"] == spiffe_id("client").as_str()))
        })?;
        ensure!(cuts(mesh)? > before, "expected that a cut is counted");
        for node in NodeName::ALL {
            poll::until_true("the agent knows who is revoked", SOON, || {
                let state = mesh.agent_state(node)?;
                Ok(state["revoked_identities"] == serde_json::json!([spiffe_id("client")]))
            })?;
        }
        let position = logs[0].position();
        let attempt = mesh.app.connect(&mesh.pod("client").place(), address, ECHO_PORT)?;
        attempt.expect_refused(QUICKLY).context("a new connection")?;
        logs[0].wait_for(position, &[("direction", "outbound"), ("reason", "identity_revoked")], SOON)?;
        for nth in 0..20 {
            let line = format!("byte for byte, {nth}");
            ensure!(unaffected.ask(&line, SOON)? == line);
        }

        mesh.registry.write("pod-client.yaml", &manifest)?;
        mesh.wait_for_outcome("client", address, ECHO_PORT, true)
            .context("with the account back")?;
        ensure!(unaffected.ask("after", SOON)? == "after");
    }
    mesh.wait_for_tunnel("client", "server")
}

pub fn a_hundred_changes(mesh: &mut Mesh) -> Result<()> {
    let server: IpAddr = mesh.pod("server").v4.into();
    let mut survivors = [
        open(mesh, "local", server)?,
        open(mesh, "local", mesh.pod("server").v6.into())?,
    ];
    let mut victim = None;
    let denied = format!("[{{ from: [{{ principals: [{}] }}] }}]", principal("client"));
    let allowed = format!(
        "[{{ from: [{{ principals: [{}] }}] }}, {{ from: [{{ principals: [{}] }}] }}]",
        principal("local"),
        principal("client")
    );
    for change in 0..CHANGES {
        if change % CUTS_EVERY == 0 {
            mesh.wait_for_outcome("client", server, ECHO_PORT, true)?;
            victim = Some(open(mesh, "client", server)?);
        }
        let cuts = change % CUTS_EVERY == CUTS_EVERY - 1;
        let name = format!("turn-{change}");
        let manifest = if cuts {
            policy(&name, "server", "Deny", &denied)
        } else {
            policy(&name, "server", "Allow", &allowed)
        };
        mesh.registry.write("turn.yaml", &manifest)?;
        let resource = format!("{MESHED}/{name}");
        let mut asked = 0;
        poll::until_true("the destination's agent enforces the change", SOON, || {
            // While it arrives, bytes flow.
            for survivor in &mut survivors {
                let line = format!("change {change}, line {asked}: {}", "x".repeat(1 + 977 * asked % 8_000));
                let echo = survivor.ask(&line, SOON)?;
                ensure!(echo == line, "expected {line:?}, heard {echo:?}");
            }
            asked += 1;
            let state = mesh.agent_state(NodeName::Two)?;
            Ok(state["policies"]
                .as_array()
                .is_some_and(|known| known.iter().any(|known| *known == resource.as_str())))
        })
        .with_context(|| resource.clone())?;
        let victim = victim.as_mut().context("somebody talks")?;
        if cuts {
            let end = victim.hear(SOON).context("the victim is not told")?;
            ensure!(end.contains("ConnectionReset"), "expected a reset, the client said {end:?}");
            mesh.registry.remove("turn.yaml")?;
        } else {
            ensure!(victim.ask("allowed", SOON)? == "allowed");
        }
    }
    for survivor in &mut survivors {
        ensure!(survivor.ask("after a hundred", SOON)? == "after a hundred");
    }
    mesh.wait_for_outcome("client", server, ECHO_PORT, true)
}
