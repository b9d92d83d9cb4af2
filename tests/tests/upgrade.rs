//! From one build to another with another eBPF ABI version, and back, under connections; and what happens where somebody ends on the
//! way. The other build is xtask/src/other_build.rs.

#[path = "upgrade/interrupted.rs"]
mod interrupted;
#[path = "upgrade/skew.rs"]
mod skew;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::binaries::Build;
use mesh_tests::bpf;
use mesh_tests::demo::PODS;
use mesh_tests::load::Load;
use mesh_tests::mesh::Mesh;
use mesh_tests::poll::{self, SOON};
use mesh_tests::process::Process;
use mesh_tests::snapshot::count_below;
use mesh_tests::stream::Stream;
use mesh_tests::topology::NodeName;
use mesh_tests::wire::Recorder;
use mesh_tests::{pins, suite};

use nix::sys::signal::Signal;

/// Where an agent first waits for something better, or a drain for the end of idle connections.
const PATIENTLY: Duration = Duration::from_secs(40);
/// New connections after each of the four takeovers.
const CONNECTIONS: u64 = 1_000;
/// Longer than any test: what is open outlives two takeovers.
const LONG_DRAIN: [&str; 2] = ["--handover-drain-seconds", "3600"];
const METRIC: &str = "mesh_capture_events_total";

struct Shared {
    mesh: Mesh,
}

fn main() -> ExitCode {
    suite::run(
        "upgrade",
        || {
            // Before the mesh is brought up in vain.
            Build::Other.path("mesh-agent")?;
            Ok(Shared {
                mesh: Mesh::start(&PODS, &mut |_| {})?,
            })
        },
        |shared, error| shared.mesh.with_logs(error),
        &[
            ("no_connection_fails_over_an_upgrade_and_a_rollback", there_and_back),
            (
                "an_agent_that_ends_while_it_takes_over_leaves_all_to_the_running_one",
                interrupted::successor_killed,
            ),
            ("after_a_crash_half_way_either_version_goes_on", interrupted::both_killed),
            ("agents_and_control_plane_may_be_a_version_apart", skew::either_way),
        ],
    )
}

/// Where a node's pins are.
fn pins(mesh: &Mesh, node: NodeName) -> PathBuf {
    pins::folder(&mesh.topology.node(node).pin_path())
}

fn pods_of(mesh: &Mesh, node: NodeName, build: Build) -> PathBuf {
    pins::own_folder(&mesh.topology.node(node).pin_path(), build).join("PODS")
}

fn log_of(mesh: &Mesh, node: NodeName) -> PathBuf {
    mesh.topology.node(node).folder.join("mesh-agent.log")
}

fn said_since(log: &Path, position: u64) -> Result<String> {
    let text = std::fs::read(log)?;
    let from = usize::try_from(position)?.min(text.len());
    Ok(String::from_utf8_lossy(&text[from..]).into_owned())
}

/// A further agent of that build on the node, which takes over; the one before, which ends when its connections have.
fn succeed(mesh: &mut Mesh, node: NodeName, build: Build) -> Result<Process> {
    let log = log_of(mesh, node);
    let position = std::fs::metadata(&log)?.len();
    let before = mesh.take_agent(node)?;
    mesh.agent_build = build;
    mesh.launch_agent_with(node, &LONG_DRAIN)?;
    poll::until_true(&format!("an agent of {build:?} takes over"), SOON, || {
        Ok(said_since(&log, position)?.contains("another agent has taken over"))
    })?;
    mesh.wait_until_ready(node)?;
    wait_until_alone(mesh, node, build)?;
    Ok(before)
}

fn wait_until_alone(mesh: &Mesh, node: NodeName, build: Build) -> Result<()> {
    pins::until_alone(&mesh.topology.node(node).pin_path(), build, SOON)
}

/// An agent of that build with a long drain, whatever ran before.
fn begin(mesh: &mut Mesh, node: NodeName, build: Build) -> Result<()> {
    if mesh.agent_id(node).is_some() {
        mesh.terminate_agent(node)?;
    }
    mesh.agent_build = build;
    mesh.launch_agent_with(node, &LONG_DRAIN)?;
    mesh.wait_until_ready(node)?;
    wait_until_alone(mesh, node, build)
}

fn begin_all(mesh: &mut Mesh, build: Build) -> Result<()> {
    for node in NodeName::ALL {
        begin(mesh, node, build)?;
    }
    mesh.wait_for_tunnel("client", "server")?;
    mesh.wait_for_tunnel("server", "client")
}

/// What a node has of ours: pins, and in the kernel programs and links by the maps that they use.
fn traces(mesh: &Mesh, node: NodeName, build: Build) -> Result<Vec<(&'static str, usize)>> {
    let shared = |name: &str| bpf::users(&bpf::open(&pins(mesh, node).join(name))?);
    let (programs, links) = shared("HEARTBEAT")?;
    let (of_sockets, _) = shared("AGENT_SOCKETS")?;
    let (of_pods, links_of_pods) = bpf::users(&bpf::open(&pods_of(mesh, node, build))?)?;
    ensure!(
        programs > 0 && links > 0 && of_pods > 0,
        "expected the capture's programs, saw none"
    );
    let place = mesh.topology.node(node);
    Ok(vec![
        ("pins", count_below(&place.pin_path())?),
        ("files of the run directory", count_below(&place.run_dir())?),
        ("programs that read HEARTBEAT", programs),
        ("links with them", links),
        ("programs that read AGENT_SOCKETS", of_sockets),
        ("programs that read PODS", of_pods),
        ("links with these", links_of_pods),
    ])
}

fn expect_traces(mesh: &Mesh, node: NodeName, build: Build, before: &[(&'static str, usize)]) -> Result<()> {
    let mut last = Vec::new();
    poll::until_true("what is left on the node is as before", PATIENTLY, || {
        last = traces(mesh, node, build)?;
        Ok(last == before)
    })
    .with_context(|| format!("before {before:?}, after {last:?}"))
}

fn stream(mesh: &Mesh, from: &str, to: IpAddr, marker: &str) -> Result<Stream> {
    let chat = mesh.app.chat(&mesh.pod(from).place(), to)?;
    let ends = [mesh.pod(from).own_address(to), to].map(|end| end.to_string());
    Stream::start(chat, ends, marker)
}

fn there_and_back(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    begin_all(mesh, Build::This)?;
    let before = NodeName::ALL.map(|node| traces(mesh, node, Build::This));
    let old_maps = NodeName::ALL.map(|node| bpf::open(&pods_of(mesh, node, Build::This)));
    let recorder = Recorder::start(&mesh.topology.node(NodeName::One).netns, "uplink")?;
    let marker = format!("marker-{:032x}", rand::random::<u128>());
    let streams: Vec<Stream> = mesh
        .pod("server")
        .addresses()
        .into_iter()
        .map(|address| stream(mesh, "client", address, &marker))
        .collect::<Result<_>>()?;
    let load = Load::start(mesh, "client", "server")?;

    let mut gone = Vec::new();
    for build in [Build::Other, Build::This] {
        for node in NodeName::ALL {
            let before = succeed(mesh, node, build)?;
            // As Kubernetes does, once the next one is ready.
            before.signal(Signal::SIGTERM)?;
            gone.push(before);
            load.wait_for(CONNECTIONS)?;
            for stream in &streams {
                stream.expect_progress()?;
            }
            // Connections that are new, with what they are told of their ends.
            for address in mesh.pod("server").forms() {
                let attempt = mesh
                    .app
                    .connect(&mesh.pod("client").place(), address, mesh_tests::app::ECHO_PORT)?;
                let peer = attempt.expect_ok()?.report["peer"].as_str().unwrap_or_default().to_owned();
                ensure!(
                    peer.contains(&address.to_string()),
                    "asked for {address}, getpeername says {peer}"
                );
            }
        }
        let by_the_other = mesh.metric(NodeName::One, METRIC, &[("event", "redirected_by_the_other")])?;
        ensure!(
            (by_the_other > 0.0) == (build == Build::Other),
            "with agents of {build:?} the other build's programs have redirected {by_the_other} connections"
        );
    }

    let (worked, failures) = load.finish()?;
    ensure!(
        failures.is_empty(),
        "{} failures beside {worked} connections: {failures:?}",
        failures.len()
    );
    // The search is not blind: who is outside the mesh is seen.
    let outside = format!("marker-{:032x}", rand::random::<u128>());
    for address in mesh.pod("server").addresses() {
        mesh.app.get(&mesh.pod("outsider").place(), address, &format!("/{outside}"))?;
    }
    let recording = recorder.finish()?;
    ensure!(
        recording.contains(outside.as_bytes()),
        "the outsider's marker is not on the wire: the search is blind"
    );
    ensure!(
        !recording.contains(marker.as_bytes()),
        "the client's marker passed between the nodes in clear"
    );
    let answered: Vec<u64> = streams.into_iter().map(Stream::finish).collect::<Result<_>>()?;
    for gone in gone {
        gone.wait(PATIENTLY).context("an agent of before ends with its connections")?;
    }
    for (node, before) in NodeName::ALL.into_iter().zip(before) {
        expect_traces(mesh, node, Build::This, &before?)?;
    }
    // No program is left that looks into the maps of before.
    for map in old_maps {
        let users = bpf::users(&map?)?;
        ensure!(
            users == (0, 0),
            "(programs, links) with maps of an agent that is gone: {users:?}"
        );
    }
    suite::say(&format!(
        "{worked} new connections, 0 failed; words of the open ones that came back: {answered:?}; {} frames between the nodes",
        recording.frames
    ));
    Ok(())
}
