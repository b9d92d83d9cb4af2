//! Agents of one build under a control plane of the other.

use anyhow::{Context as _, Result, ensure};
use mesh_tests::app::ECHO_PORT;
use mesh_tests::binaries::Build;
use mesh_tests::manifests::policy;
use mesh_tests::mesh::{Mesh, PodSpec};
use mesh_tests::poll::{self, SOON};
use mesh_tests::topology::NodeName;
use serde_json::Value;

use super::{PATIENTLY, Shared, begin_all, succeed};

pub fn either_way(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    begin_all(mesh, Build::This)?;
    control_plane_of(mesh, Build::Other)?;
    whole(mesh).context("agents of This under a control plane of Other")?;
    agents_of(mesh, Build::Other)?;
    whole(mesh).context("agents and control plane of Other")?;
    control_plane_of(mesh, Build::This)?;
    whole(mesh).context("agents of Other under a control plane of This")?;
    agents_of(mesh, Build::This)?;
    whole(mesh).context("agents and control plane of This again")
}

fn control_plane_of(mesh: &mut Mesh, build: Build) -> Result<()> {
    mesh.kill_control();
    mesh.control_build = build;
    mesh.start_control()
}

fn agents_of(mesh: &mut Mesh, build: Build) -> Result<()> {
    for node in NodeName::ALL {
        succeed(mesh, node, build)?.wait(PATIENTLY)?;
    }
    Ok(())
}

/// What goes from the one to the other, each way: workloads, policies, settings, certificates; reports.
fn whole(mesh: &mut Mesh) -> Result<()> {
    mesh.wait_for_tunnel("client", "server")?;
    let local = mesh.pod("local").v4.into();
    let rule = format!("[{{ to: [{{ ports: [{ECHO_PORT}] }}] }}]");
    mesh.registry
        .write("deny.yaml", &policy("deny-local", "local", "Deny", &rule))?;
    mesh.wait_for_outcome("client", local, ECHO_PORT, false)?;
    mesh.registry.remove("deny.yaml")?;
    mesh.wait_for_outcome("client", local, ECHO_PORT, true)?;
    mesh.add_pod(&PodSpec::new("passing", NodeName::Two, 50, true))?;
    mesh.wait_for_tunnel("client", "passing")
        .context("a Pod's proof goes up, and down to the others")?;
    mesh.delete_pod("passing")?;
    for pod in ["client", "server", "local"] {
        poll::until_true(&format!("{pod} is proven to the control plane"), SOON, || {
            Ok(mesh.capture_state(pod)? == "proven")
        })?;
    }
    for node in NodeName::ALL {
        let dump: Value = serde_json::from_str(&mesh.agent_page(node, 15000, "/config_dump")?.body)?;
        let discovery = &dump["discovery"];
        ensure!(
            discovery["synced"] == true && discovery["rejected"].as_array().is_some_and(Vec::is_empty),
            "{} says of its discovery: {discovery}",
            node.as_str()
        );
    }
    Ok(())
}
