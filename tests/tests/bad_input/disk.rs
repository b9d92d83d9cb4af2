//! Disks without room.

use std::net::IpAddr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::app::{self, ECHO_PORT};
use mesh_tests::binaries;
use mesh_tests::disk::Disk;
use mesh_tests::manifests::policy;
use mesh_tests::mesh::PodSpec;
use mesh_tests::poll::{self, SOON};
use mesh_tests::process::Process;
use mesh_tests::topology::NodeName;
use serde_json::Value;

use super::{PATIENTLY, Shared, expect_words, since, size};

const NO_SPACE: &str = "No space left on device";

fn files(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// A control plane of its own, beside the mesh's.
pub fn control_plane(shared: &mut Shared) -> Result<()> {
    let mesh = &shared.mesh;
    let world = mesh.topology.world_place();
    let binary = binaries::path("mesh-control")?;
    let disk = Disk::create(mesh.topology.folder(), 256 * 1024)?;
    let registry = mesh.topology.folder().join("registry-of-full-disk");
    std::fs::create_dir(&registry)?;
    let state = disk.path().join("state");
    let [registry_path, state_path] = [&registry, &state].map(|path| path.display().to_string());
    let serve = [
        ["--registry", &registry_path, "--state-dir", &state_path].as_slice(),
        &["--listen", "127.0.0.1:16012", "--admin", "127.0.0.1:16014"],
    ]
    .concat();
    let token = mesh.topology.folder().join("full.token.json").display().to_string();
    let issue = [
        ["node-token", "node-9", "--state-dir", &state_path].as_slice(),
        &["--address", "127.0.0.1:16012", "--output", &token],
    ]
    .concat();

    // At the first start, and at the first token: no root that is half a root.
    disk.fill()?;
    for arguments in [&serve, &issue] {
        let output = world.run(&binary, arguments, SOON)?;
        let said = format!("{}{}", output.stdout, output.stderr);
        ensure!(!output.status.success(), "expected an error, saw {said}");
        expect_words(&said, &[NO_SPACE, &state_path])?;
        ensure!(files(&state)?.is_empty(), "left behind: {:?}", files(&state)?);
    }
    disk.make_room()?;
    let log = mesh.topology.folder().join("mesh-control-of-full-disk.log");
    let control = Process::start("the other mesh-control", world.command(&binary, &serve)?, log.clone())?;
    poll::until_true("it serves", SOON, || Ok(since(&log, 0)?.contains("mesh-control serves")))?;

    // At a further token, while it serves.
    disk.fill()?;
    let output = world.run(&binary, &issue, SOON)?;
    ensure!(
        !output.status.success() && !Path::new(&token).exists(),
        "a token of which nothing is known"
    );
    expect_words(&format!("{}{}", output.stdout, output.stderr), &[NO_SPACE])?;

    // At saving the last good form of what broke: said, in force, and saved when there is room.
    let file = registry.join("deny.yaml");
    let page = |path: &str| app::page(mesh.topology.world(), IpAddr::from([127, 0, 0, 1]), 16014, path);
    let versions = || -> Result<Value> { Ok(serde_json::from_str::<Value>(&page("/status")?.body)?["versions"].clone()) };
    let before = versions()?;
    std::fs::write(&file, policy("deny", "server", "Deny", "[{}]"))?;
    poll::until_true("the policy is taken", SOON, || Ok(versions()? != before))?;
    let taken = versions()?;
    let said = size(&log)?;
    std::fs::write(&file, "broken: [")?;
    poll::until_true("that it cannot be saved is said", SOON, || {
        Ok(since(&log, said)?.contains(NO_SPACE))
    })?;
    let failed = page("/metrics")?.body;
    ensure!(
        failed
            .lines()
            .any(|line| line.starts_with("mesh_control_state_writes_failed_total ") && !line.ends_with(" 0")),
        "expected that it is counted, saw {failed}"
    );
    ensure!(versions()? == taken, "the policy is no longer in force");
    disk.make_room()?;
    poll::until_true("it is saved when there is room", PATIENTLY, || {
        Ok(state.join("last-good.json").exists())
    })?;
    let output = world.run(&binary, &issue, SOON)?;
    output.ok("a token when there is room")?;
    control.terminate(SOON).map(drop)
}

/// On a disk in the place of its run directory, with what was there.
pub fn agent(shared: &mut Shared) -> Result<()> {
    const NODE: NodeName = NodeName::Two;
    let mesh = &mut shared.mesh;
    let run_dir = mesh.topology.node(NODE).run_dir();
    let log = mesh.topology.node(NODE).folder.join("mesh-agent.log");
    mesh.terminate_agent(NODE)?;
    let kept = mesh.topology.node(NODE).folder.join("run-kept");
    let copy = |from: &Path, to: &Path| -> Result<()> {
        let copied = Command::new("cp").arg("-a").arg(from.join(".")).arg(to).status()?;
        ensure!(copied.success(), "copying {}", from.display());
        Ok(())
    };
    std::fs::create_dir(&kept)?;
    copy(&run_dir, &kept)?;
    let disk = Disk::mount_at(run_dir.clone(), 1 << 20)?;
    copy(&kept, &run_dir)?;

    // The agent that starts on it serves the Pods of before.
    disk.fill()?;
    mesh.start_agent(NODE)?;
    mesh.wait_for_tunnel("client", "server")?;
    // What it cannot remember it enforces all the same; and what it cannot write down it does not begin.
    let said = size(&log)?;
    let server = mesh.pod("server").v4.into();
    let rule = format!("[{{ to: [{{ ports: [{ECHO_PORT}] }}] }}]");
    mesh.registry
        .write("deny.yaml", &policy("deny-full", "server", "Deny", &rule))?;
    mesh.wait_for_outcome("client", server, ECHO_PORT, false)?;
    poll::until_true("that it cannot remember is said", SOON, || {
        let said = since(&log, said)?;
        Ok(said.contains("the state cannot be remembered") && said.contains(NO_SPACE))
    })?;
    ensure!(!run_dir.join("memory").exists(), "a memory of what is no longer so");
    let pod = PodSpec {
        name: "late",
        node: NODE,
        host: 63,
        meshed: true,
        annotations: "",
    };
    // The memory that is gone has made room.
    disk.fill()?;
    let refused = mesh.add_pod(&pod).err().context("a Pod was enrolled that no file tells of")?;
    expect_words(&format!("{refused:#}"), &[NO_SPACE])?;
    ensure!(mesh.listed("late")?.is_none(), "it is listed all the same");

    disk.make_room()?;
    mesh.enroll("late")?;
    mesh.registry.remove("deny.yaml")?;
    mesh.wait_for_tunnel("client", "late")?;
    poll::until_true("it remembers again", SOON, || {
        Ok(run_dir.join("memory").exists() && since(&log, said)?.contains("the state is remembered again"))
    })?;
    mesh.delete_pod("late")?;
    mesh.terminate_agent(NODE)?;
    drop(disk);
    std::fs::remove_dir_all(&kept)?;
    mesh.start_agent(NODE)?;
    mesh.wait_for_tunnel("client", "server")
}
