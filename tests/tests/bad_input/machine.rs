//! Machines that lack what the agent needs, or on which others work.

use std::path::Path;

use anyhow::{Result, ensure};
use mesh_tests::binaries;
use mesh_tests::bpf::{ALLOW_MULTI, Attached, CONNECT4, Count, EXCLUSIVE};
use mesh_tests::mesh::Mesh;
use mesh_tests::process::Output;
use mesh_tests::topology::NodeName;

use super::{PATIENTLY, Shared, expect_words};

const NODE: NodeName = NodeName::Two;

/// An agent beside the node's own, in a folder and on ports of its own, which is to end by itself.
fn another_agent(mesh: &Mesh, start: &str, pins: &Path, cgroup: &Path) -> Result<Output> {
    let place = mesh.topology.node(NODE);
    let paths = [
        binaries::path("mesh-agent")?,
        mesh.token_file(NODE),
        place.folder.join("other-run"),
        pins.to_owned(),
        cgroup.to_owned(),
    ];
    let [agent, token, run_dir, pins, cgroup] = paths.map(|path| path.display().to_string());
    let script = format!(
        "{start} {agent} run --token-file {token} --run-dir {run_dir} --pin-path {pins} --cgroup-root {cgroup} \
         --metrics 127.0.0.1:16020 --ready 127.0.0.1:16021 --admin 127.0.0.1:16000"
    );
    place.agent_place().run("/bin/sh".as_ref(), &["-c", &script], PATIENTLY)
}

fn expect_failure(output: &Output, words: &[&str]) -> Result<()> {
    ensure!(
        !output.status.success(),
        "expected that it ends with an error, saw {output:?}"
    );
    expect_words(&output.stderr, words)
}

/// The node's own agent noticed nothing.
fn works(mesh: &Mesh) -> Result<()> {
    mesh.wait_for_tunnel("client", "server")?;
    mesh.wait_for_tunnel("server", "client")
}

pub fn no_bpffs(shared: &mut Shared) -> Result<()> {
    let mesh = &shared.mesh;
    let place = mesh.topology.node(NODE);
    let folder = place.folder.join("no-bpffs");
    std::fs::create_dir(&folder)?;
    let output = another_agent(mesh, "exec", &folder.join("culvert"), place.cgroup.path())?;
    expect_failure(&output, &["the datapath does not start", "mount -t bpf", "no-bpffs"])?;
    works(mesh)
}

pub fn few_descriptors(shared: &mut Shared) -> Result<()> {
    let mesh = &shared.mesh;
    let place = mesh.topology.node(NODE);
    let pins = place.bpffs.path().join("other");
    let output = another_agent(
        mesh,
        "ulimit -n 256 && exec setpriv --bounding-set -sys_resource",
        &pins,
        place.cgroup.path(),
    )?;
    expect_failure(&output, &["256 open descriptors are allowed", "ulimit -Hn", "at least 2048"])?;
    ensure!(!pins.exists(), "it began all the same");
    works(mesh)
}

pub fn others_programs(shared: &mut Shared) -> Result<()> {
    let mesh = &shared.mesh;
    let place = mesh.topology.node(NODE);
    let (connects, round_trips) = (Count::new()?, Count::new()?);
    let attached = [
        Attached::counting(place.cgroup.path(), CONNECT4, ALLOW_MULTI, &connects)?,
        Attached::counting_round_trips(place.cgroup.path(), &round_trips)?,
    ];
    works(mesh)?;
    ensure!(connects.get()? > 0, "the other's program does not see the Pod's connects");
    ensure!(
        round_trips.get()? > 0,
        "the other's sockops program is no longer called at round trips, as it asked"
    );
    // Ours, too: without its sockops program no connection finds its destination.
    drop(attached);
    works(mesh)
}

pub fn exclusive_program(shared: &mut Shared) -> Result<()> {
    let mesh = &shared.mesh;
    let place = mesh.topology.node(NODE);
    let cgroup = place.cgroup.child("exclusive")?;
    let count = Count::new()?;
    let attached = Attached::counting(cgroup.path(), CONNECT4, EXCLUSIVE, &count)?;
    let pins = place.bpffs.path().join("other");
    let output = another_agent(mesh, "exec", &pins, cgroup.path())?;
    expect_failure(&output, &["attaching connect4", "another program", "BPF_F_ALLOW_MULTI"])?;
    drop(attached);
    let run_dir = place.folder.join("other-run").display().to_string();
    let arguments = ["cleanup", "--run-dir", &run_dir, "--pin-path", &pins.display().to_string()];
    let cleaned = place
        .agent_place()
        .run(&binaries::path("mesh-agent")?, &arguments, PATIENTLY)?;
    cleaned.ok("cleaning up after a start that failed")?;
    works(mesh)
}
