//! What was proven once and counts no longer: a deleted service account, a root that was taken away; and what none of it touches.

use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::app::ECHO_PORT;
use mesh_tests::binaries;
use mesh_tests::manifests::{MESHED, policy, principal};
use mesh_tests::mesh::Mesh;
use mesh_tests::poll::{self, SOON};
use mesh_tests::process::Conversation;
use mesh_tests::topology::NodeName;

use super::open;

/// How many changes of policy a connection that none of them is about must outlive.
const CHANGES: usize = 100;
/// Each of these changes cuts somebody, so that the changes are seen to be enforced and not only written.
const CUTS_EVERY: usize = 10;
/// Between the documents of a manifest.
const DOCUMENT: &str = "---\n";

/// Both agents hear of it, and whoever is first cuts both ends: the client is told, and one of them, or both, log and count it.
fn expect_proof_broken(
    mesh: &Mesh,
    chats: &[Conversation],
    change: impl FnOnce() -> Result<()>,
    reason: &str,
    label: &str,
) -> Result<()> {
    let logs = NodeName::ALL.map(|node| mesh.access_log(node));
    let positions = logs.each_ref().map(|log| log.position());
    let cuts = || -> Result<f64> {
        let counts = NodeName::ALL.map(|node| mesh.metric(node, "mesh_policy_cut_total", &[("policy", label)]));
        counts.into_iter().sum()
    };
    let before = cuts()?;
    change()?;
    for chat in chats {
        let end = chat.hear(SOON).context("the client is not told")?;
        ensure!(end.contains("ConnectionReset"), "expected a reset, the client said {end:?}");
    }
    poll::until_true("a log line for each that was cut", SOON, || {
        let logged = logs
            .iter()
            .zip(positions)
            .map(|(log, position)| log.since(position, &[("reason", reason)]).len());
        Ok(logged.sum::<usize>() >= chats.len() && cuts()? >= before + chats.len() as f64)
    })
}

pub fn deleted_account(mesh: &mut Mesh) -> Result<()> {
    let server = mesh.pod("server").forms();
    let mut unaffected = open(mesh, "local", server[0])?;
    let mut plaintext = open(mesh, "outsider", server[0])?;
    // Of both directions, to the account's Pod and from it.
    let mut chats = vec![open(mesh, "server", mesh.pod("client").v4.into())?];
    for address in server {
        chats.push(open(mesh, "client", address)?);
    }
    let file = mesh.registry.folder().join("pod-client.yaml");
    let manifest = std::fs::read_to_string(&file)?;
    let (account, pod) = manifest.split_once(DOCUMENT).context("two documents")?;
    ensure!(account.contains("kind: ServiceAccount"), "{account}");
    let delete = || mesh.registry.write("pod-client.yaml", pod);
    expect_proof_broken(mesh, &chats, delete, "cut_by_revocation", "_identity_revoked")?;
    // The Pod is there, and proves nothing: neither by a tunnel, nor as itself in clear.
    for address in server {
        mesh.wait_for_outcome("client", address, ECHO_PORT, false)?;
    }
    mesh.wait_for_outcome("server", mesh.pod("client").v4.into(), ECHO_PORT, false)?;
    for chat in [&mut unaffected, &mut plaintext] {
        ensure!(chat.ask("not about me", SOON)? == "not about me");
    }
    for node in NodeName::ALL {
        let known = mesh.agent_state(node)?["revoked_identities"].to_string();
        ensure!(known.contains("/ns/shop/sa/client"), "{known}");
    }
    // A restart of the control plane pardons nobody.
    mesh.kill_control();
    mesh.start_control()?;
    ensure!(mesh.control_page("/status")?.body.contains("/ns/shop/sa/client"));
    mesh.wait_for_outcome("client", server[0], ECHO_PORT, false)?;
    // The account is back, and its Pod gets a certificate again.
    mesh.registry.write("pod-client.yaml", &manifest)?;
    for address in server {
        mesh.wait_for_outcome("client", address, ECHO_PORT, true)?;
    }
    ensure!(unaffected.ask("after", SOON)? == "after");
    Ok(())
}

fn rotate(mesh: &Mesh, step: &str) -> Result<()> {
    let state_dir = mesh.control_state_dir();
    let state_dir = state_dir.to_str().context("UTF-8")?;
    let arguments = ["rotate-root", step, "--state-dir", state_dir];
    let world = mesh.topology.world_place();
    world
        .run(&binaries::path("mesh-control")?, &arguments, SOON)?
        .ok("mesh-control rotate-root")?;
    Ok(())
}

fn trusted(mesh: &Mesh, roots: u64) -> Result<()> {
    for node in NodeName::ALL {
        poll::until_true(&format!("{} trusts {roots} roots", node.as_str()), SOON, || {
            Ok(mesh.agent_state(node)?["trusted_roots"] == roots)
        })?;
    }
    Ok(())
}

pub fn removed_root(mesh: &mut Mesh) -> Result<()> {
    let server: IpAddr = mesh.pod("server").v4.into();
    let mut chat = open(mesh, "client", server)?;
    let mut plaintext = open(mesh, "outsider", server)?;
    rotate(mesh, "prepare")?;
    trusted(mesh, 2)?;
    rotate(mesh, "activate")?;
    ensure!(chat.ask("the former one is trusted", SOON)? == "the former one is trusted");
    expect_proof_broken(
        mesh,
        &[chat],
        || rotate(mesh, "retire"),
        "cut_by_removed_root",
        "_root_removed",
    )?;
    trusted(mesh, 1)?;
    ensure!(plaintext.ask("relies on no root", SOON)? == "relies on no root");
    // Everybody has another certificate, and the control plane is believed by the root that it named itself.
    for pod in ["client", "local"] {
        mesh.wait_for_outcome(pod, server, ECHO_PORT, true)?;
    }
    mesh.kill_control();
    mesh.start_control()?;
    let rule = format!("[{{ from: [{{ principals: [{}] }}] }}]", principal("client"));
    mesh.registry.write("after.yaml", &policy("after", "server", "Deny", &rule))?;
    mesh.wait_for_outcome("client", server, ECHO_PORT, false)?;
    mesh.registry.remove("after.yaml")?;
    mesh.wait_for_outcome("client", server, ECHO_PORT, true)
}

pub fn hundred_changes(mesh: &mut Mesh) -> Result<()> {
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
