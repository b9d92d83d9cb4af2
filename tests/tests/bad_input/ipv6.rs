//! Without IPv6 in the kernel's settings, as on many machines.

use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::app::ECHO_PORT;
use mesh_tests::manifests::{MESHED, PodManifest, pod_uid};
use mesh_tests::mesh::Mesh;
use mesh_tests::poll;
use mesh_tests::topology::NodeName;

use super::{PATIENTLY, Shared};

const NODE: NodeName = NodeName::Two;
const SETTINGS: [&str; 2] = ["ipv6.conf.all.disable_ipv6", "ipv6.conf.default.disable_ipv6"];

fn v4_works_both_ways(mesh: &Mesh, pod: &str) -> Result<()> {
    for (from, to) in [("client", pod), (pod, "client")] {
        mesh.wait_for_path(from, mesh.pod(to).v4.into(), "tunnel")
            .with_context(|| format!("{from} → {to}"))?;
    }
    Ok(())
}

/// A Pod that has IPv4 only, as on a cluster that has.
fn make_single(mesh: &mut Mesh, host: u8) -> Result<()> {
    mesh.topology.add_pod("single", NODE, host)?;
    SETTINGS
        .iter()
        .try_for_each(|setting| mesh.pod("single").netns.set_sysctl(setting, "1"))
}

fn enroll_single(mesh: &mut Mesh) -> Result<()> {
    let v4: IpAddr = mesh.pod("single").v4.into();
    mesh.registry.write_pod(&PodManifest {
        name: "single",
        namespace: MESHED,
        node: NODE,
        addresses: &[v4],
        annotations: "",
    })?;
    mesh.start_server("single")?;
    let pod = mesh.pod("single");
    let (netns, cgroup) = (
        pod.netns.path().display().to_string(),
        pod.cgroup.path().display().to_string(),
    );
    let (uid, address) = (pod_uid("single"), v4.to_string());
    let arguments = [
        [
            "--uid",
            &uid,
            "--namespace",
            MESHED,
            "--name",
            "single",
            "--service-account",
            "single",
        ]
        .as_slice(),
        &["--netns", &netns, "--cgroup", &cgroup, "--address", &address],
    ]
    .concat();
    mesh.agent_command(NODE, "enroll", &arguments).map(drop)
}

pub fn of_pod(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    make_single(mesh, 62)?;
    enroll_single(mesh)?;
    v4_works_both_ways(mesh, "single")?;
    // As a socket of IPv6 writes it.
    let mapped = mesh.pod("client").v4.to_ipv6_mapped().into();
    mesh.app
        .connect(&mesh.pod("single").place(), mapped, ECHO_PORT)?
        .expect_ok()?;
    mesh.delete_pod("single")
}

pub fn of_node(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    // The device of the one before may not be gone yet.
    make_single(mesh, 64)?;
    mesh.terminate_agent(NODE)?;
    for setting in SETTINGS {
        mesh.topology.node(NODE).netns.set_sysctl(setting, "1")?;
    }
    mesh.start_agent(NODE)?;
    enroll_single(mesh)?;
    v4_works_both_ways(mesh, "single")?;
    let listed = mesh.listed("single")?.context("the agent lists its Pod")?;
    ensure!(listed["proven"] == true, "expected that its capture is proven, saw {listed}");
    mesh.delete_pod("single")?;
    // One with an address that its node can no longer reach is said to be just that.
    let address = mesh.pod("server").v6.to_string();
    poll::until_true("the Pod with an address of IPv6 is not proven", PATIENTLY, || {
        let listed = mesh.listed("server")?.context("the agent lists its Pod")?;
        let reason = listed["reason"].as_str().unwrap_or_default();
        Ok(listed["proven"] == false && reason.contains(&address))
    })
}
