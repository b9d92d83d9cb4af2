//! What agents leave on a node.

use anyhow::{Context as _, Result, ensure};
use mesh_tests::bpf;
use mesh_tests::mesh::Mesh;
use mesh_tests::poll;
use mesh_tests::snapshot::{self, count_below};
use mesh_tests::suite;
use mesh_tests::topology::NodeName;

use super::{PATIENTLY, Shared, pin_of, pins};

const CRASHES: usize = 100;

/// What an agent holds, and holds of the node, when nothing goes on: a number each.
pub fn traces(mesh: &Mesh, node: NodeName) -> Result<Vec<(String, usize)>> {
    let id = mesh.agent_id(node).context("an agent runs")?;
    let place = mesh.topology.node(node);
    let mut traces = vec![
        ("descriptors".to_owned(), std::fs::read_dir(format!("/proc/{id}/fd"))?.count()),
        ("pins".to_owned(), count_below(&place.pin_path())?),
        ("files of the run directory".to_owned(), count_below(&place.run_dir())?),
        ("cgroups".to_owned(), count_below(place.cgroup.path())?),
    ];
    let (programs, links) = bpf::users(&bpf::open(&pins(mesh, node).join(pin_of("PODS")))?)?;
    ensure!(programs > 0 && links > 0, "expected the capture's programs, saw none");
    traces.push(("programs".to_owned(), programs));
    traces.push(("links".to_owned(), links));
    for pod in ["client", "server", "local"] {
        if mesh.pod(pod).node == node {
            traces.push((
                format!("what is seen in {pod}"),
                snapshot::of(&mesh.pod(pod).netns)?.lines().count(),
            ));
        }
    }
    Ok(traces)
}

/// Idle connections of before, in TIME_WAIT or in a pool, go away by themselves.
pub fn expect_traces(mesh: &Mesh, node: NodeName, before: &[(String, usize)]) -> Result<()> {
    let mut last = Vec::new();
    poll::until_true("what the agents hold is as before", PATIENTLY, || {
        last = traces(mesh, node)?;
        Ok(before.iter().zip(&last).all(|((_, before), (_, after))| after <= before))
    })
    .with_context(|| format!("before {before:?}, after {last:?}"))
}

pub fn cycles(variable: &str, default: usize) -> usize {
    std::env::var(variable)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

pub fn crashes(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    let node = NodeName::Two;
    let crash = |mesh: &mut Mesh| -> Result<()> {
        mesh.kill_agent(node);
        mesh.start_agent(node)
    };
    crash(mesh)?;
    mesh.wait_for_tunnel("client", "server")?;
    let before = traces(mesh, node)?;
    for _ in 0..cycles("CULVERT_TEST_CRASHES", CRASHES) {
        crash(mesh)?;
    }
    mesh.wait_for_tunnel("client", "server")?;
    expect_traces(mesh, node, &before)?;
    suite::say(&format!("as before: {before:?}"));
    Ok(())
}
