//! Agents that take over from each other.

use std::io::Read as _;
use std::net::IpAddr;
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::app::ECHO_PORT;
use mesh_tests::binaries;
use mesh_tests::demo::PODS;
use mesh_tests::manifests::policy;
use mesh_tests::mesh::{Mesh, PodSpec};
use mesh_tests::poll::{self, SOON};
use mesh_tests::process::{Process, tail};
use mesh_tests::talk::Talk;
use mesh_tests::topology::NodeName;
use nix::sys::signal::Signal;
use serde_json::Value;

use super::traces::{cycles, expect_traces, traces};
use super::{PATIENTLY, READY_PORT, Shared, fingerprints};
use mesh_tests::load::Load;

/// New connections over all restarts together.
const CONNECTIONS: u64 = 10_000;

/// A further agent on the node, while the first one runs; that one, which ends when its connections have.
fn succeed(mesh: &mut Mesh, node: NodeName) -> Result<Process> {
    let log = mesh.topology.node(node).folder.join("mesh-agent.log");
    let position = std::fs::metadata(&log)?.len();
    let before = mesh.take_agent(node)?;
    mesh.launch_agent(node)?;
    poll::until_true("the agent before is taken over", SOON, || {
        let text = std::fs::read(&log)?;
        let new = String::from_utf8_lossy(&text[usize::try_from(position)?.min(text.len())..]).into_owned();
        Ok(new.contains("another agent has taken over"))
    })?;
    Ok(before)
}

pub fn graceful_restarts(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    // Both ends in turn; the first two bring everything to where it stays.
    for node in NodeName::ALL {
        succeed(mesh, node)?.wait(PATIENTLY)?;
        mesh.wait_until_ready(node)?;
    }
    mesh.wait_for_tunnel("client", "server")?;
    let before = NodeName::ALL.map(|node| traces(mesh, node));
    let restarts = cycles("CULVERT_TEST_RESTARTS", 10);
    let load = Load::start(mesh, "client", "server")?;
    let logs = NodeName::ALL.map(|node| mesh.access_log(node));
    let positions = logs.each_ref().map(|log| log.position());
    for restart in 0..restarts {
        let node = NodeName::ALL[restart % 2];
        let gone = succeed(mesh, node).with_context(|| format!("restart {restart} of {}", node.as_str()))?;
        load.wait_for(CONNECTIONS / restarts as u64)?;
        gone.wait(PATIENTLY)
            .context("the agent of before ends with its connections")?;
    }
    let (worked, failures) = load.finish()?;
    let lines = logs
        .iter()
        .zip(positions)
        .flat_map(|(log, position)| log.since(position, &[]));
    let not_ok: Vec<Value> = lines.filter(|line| line["result"] != "ok").collect();
    ensure!(
        failures.is_empty(),
        "{} failures beside {worked} connections over {restarts} restarts: {failures:?}; {not_ok:?}",
        failures.len()
    );
    ensure!(worked >= CONNECTIONS, "only {worked} connections");
    for (node, before) in NodeName::ALL.into_iter().zip(before) {
        expect_traces(mesh, node, &before?)?;
    }
    Ok(())
}

pub fn drain(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    let server: IpAddr = mesh.pod("server").v4.into();
    let mut chat = mesh.app.chat(&mesh.pod("client").place(), server)?;
    ensure!(chat.ask("before", SOON)? == "before");
    let gone = NodeName::ALL.map(|node| succeed(mesh, node));
    for round in 0..10 {
        let word = format!("while it drains {round}");
        ensure!(chat.ask(&word, SOON)? == word);
    }
    mesh.wait_for_tunnel("client", "server")?;
    ensure!(chat.ask("still", SOON)? == "still");
    drop(chat);
    for gone in gone {
        gone?.wait(PATIENTLY).context("without its last connection it ends")?;
    }
    mesh.wait_for_tunnel("client", "server")
}

/// As a DaemonSet's rollout needs it: each of the two tells of itself, and the one that was taken over stays until it is told to end; it
/// would be started again, and take over in its turn.
pub fn each_tells_of_itself(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    let node = NodeName::One;
    let folder = mesh.topology.node(node).folder.clone();
    let sockets = ["one", "other"].map(|name| folder.join(format!("ready-{name}.sock")).display().to_string());
    let ask = |mesh: &Mesh, socket: &str, more: &[&str]| {
        let arguments = [&["ready", "--ready-socket", socket], more].concat();
        let place = mesh.topology.node(node).agent_place();
        place.run(&binaries::path("mesh-agent")?, &arguments, PATIENTLY)
    };
    mesh.terminate_agent(node)?;
    mesh.launch_agent_with(
        node,
        &[
            "--ready-socket",
            &sockets[0],
            "--wait-for-sigterm",
            "--handover-drain-seconds",
            "1",
        ],
    )?;
    mesh.wait_until_ready(node)?;
    let said = ask(mesh, &sockets[0], &[])?;
    ensure!(said.status.success() && said.stdout.trim() == "ready", "{said:?}");
    let mut before = mesh.take_agent(node)?;
    mesh.launch_agent_with(node, &["--ready-socket", &sockets[1]])?;
    poll::until_true("the next one is ready itself", SOON, || {
        Ok(ask(mesh, &sockets[1], &[])?.status.success())
    })?;
    // Its drain is a second; it has nothing to do from then on.
    let log = folder.join("mesh-agent.log");
    poll::until_true("it waits for its end", PATIENTLY, || {
        Ok(tail(&log, 200).contains("nothing is left to do; SIGTERM is waited for"))
    })?;
    let said = ask(mesh, &sockets[0], &[])?;
    ensure!(
        said.status.success() && said.stdout.contains("another agent has taken over"),
        "it was taken over, and says {said:?}"
    );
    ensure!(ask(mesh, &sockets[0], &["--alive"])?.status.success(), "it lives");
    before.check_running().context("it has ended without being told to")?;
    before.terminate(PATIENTLY)?;
    ensure!(!ask(mesh, &sockets[0], &["--alive"])?.status.success(), "nobody is there");
    mesh.wait_for_tunnel("client", "server")
}

/// Two agents on one folder would share a datapath; who does not answer is not simply pushed aside.
pub fn hung_agent_keeps_its_folder(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    let running = mesh.take_agent(NodeName::One)?;
    running.signal(Signal::SIGSTOP)?;
    mesh.launch_agent(NodeName::One)?;
    let second = mesh.take_agent(NodeName::One)?;
    let status = second.wait(PATIENTLY).context("the second agent gives up")?;
    let said = tail(&mesh.topology.node(NodeName::One).folder.join("mesh-agent.log"), 3);
    ensure!(
        !status.success() && said.contains("another agent runs there, and cannot be taken over from"),
        "expected that it says why, saw {status}: {said}"
    );
    running.signal(Signal::SIGCONT)?;
    running.terminate(PATIENTLY)?;
    mesh.start_agent(NodeName::One)?;
    mesh.wait_for_tunnel("client", "server")
}

/// The state and the keys come with the handover: there is nobody to ask.
pub fn without_control_plane(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    let server: IpAddr = mesh.pod("server").v4.into();
    let rule = format!("[{{ to: [{{ ports: [{ECHO_PORT}] }}] }}]");
    mesh.registry
        .write("deny.yaml", &policy("deny-local", "local", "Deny", &rule))?;
    mesh.wait_for_outcome("client", mesh.pod("local").v4.into(), ECHO_PORT, false)?;
    let mut chat = mesh.app.chat(&mesh.pod("client").place(), server)?;
    let certificates = |mesh: &Mesh| -> Result<Vec<_>> { NodeName::ALL.iter().map(|node| fingerprints(mesh, *node)).collect() };
    let before = certificates(mesh)?;
    ensure!(before.iter().all(|of| !of.is_empty()), "no certificates before: {before:?}");
    mesh.kill_control();
    let gone = NodeName::ALL.map(|node| succeed(mesh, node));
    for node in NodeName::ALL {
        let page = mesh.agent_page(node, READY_PORT, "/healthz/ready")?;
        ensure!(
            page.status == 200 && page.body.contains("from memory"),
            "expected that it says from where it knows, saw {page:?}"
        );
    }
    ensure!(
        certificates(mesh)? == before,
        "expected the certificates of before, {before:?}"
    );
    ensure!(chat.ask("drains", SOON)? == "drains");
    drop(chat);
    for gone in gone {
        gone?.wait(PATIENTLY)?;
    }
    mesh.wait_for_tunnel("client", "server")?;
    mesh.wait_for_tunnel("server", "client")?;
    for address in mesh.pod("local").forms() {
        let attempt = mesh.app.connect(&mesh.pod("client").place(), address, ECHO_PORT)?;
        attempt
            .expect_refused(PATIENTLY)
            .context("a policy of before is no longer enforced")?;
    }
    mesh.start_control()?;
    mesh.registry.remove("deny.yaml")?;
    mesh.wait_for_outcome("client", mesh.pod("local").v4.into(), ECHO_PORT, true)
}

pub fn drain_ends(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    let server: IpAddr = mesh.pod("server").v4.into();
    let node = NodeName::Two;
    mesh.terminate_agent(node)?;
    mesh.launch_agent_with(node, &["--handover-drain-seconds", "1"])?;
    mesh.wait_until_ready(node)?;
    mesh.wait_for_tunnel("client", "server")?;
    let mut chat = mesh.app.chat(&mesh.pod("client").place(), server)?;
    ensure!(chat.ask("before", SOON)? == "before");
    let gone = succeed(mesh, node)?;
    let end = chat.hear(SOON).context("the client is not told of its connection's end")?;
    ensure!(end.contains("error"), "expected that the drain's end resets it, saw {end}");
    gone.wait(PATIENTLY).context("it outlives its drain")?;
    mesh.wait_for_tunnel("client", "server")
}

/// SIGTERM without a successor: what is open goes on, new ones are refused, and `--drain-seconds` is the end of it.
pub fn stop_drains(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    let server: IpAddr = mesh.pod("server").v4.into();
    let node = NodeName::Two;
    for (seconds, is_cut) in [("3600", false), ("1", true)] {
        mesh.terminate_agent(node)?;
        mesh.launch_agent_with(node, &["--drain-seconds", seconds])?;
        mesh.wait_until_ready(node)?;
        mesh.wait_for_tunnel("client", "server")?;
        let mut chat = mesh.app.chat(&mesh.pod("client").place(), server)?;
        ensure!(chat.ask("before", SOON)? == "before");
        let stopping = mesh.take_agent(node)?;
        stopping.signal(Signal::SIGTERM)?;
        if is_cut {
            let end = chat.hear(SOON).context("the client is not told of its connection's end")?;
            ensure!(end.contains("error"), "expected that the drain's end resets it, saw {end}");
        } else {
            // It takes none any longer, and so it has heard of it.
            mesh.wait_for_outcome("client", server, ECHO_PORT, false)?;
            ensure!(chat.ask("while it drains", SOON)? == "while it drains");
            drop(chat);
        }
        stopping
            .wait(PATIENTLY)
            .with_context(|| format!("it outlives a drain of {seconds} s"))?;
        mesh.start_agent(node)?;
    }
    mesh.wait_for_tunnel("client", "server")
}

/// Who holds the handover's socket and says nothing keeps no other from taking over.
pub fn silent_successor(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    let node = NodeName::Two;
    let socket = mesh.topology.node(node).run_dir().join("handover.sock");
    let mut silent = UnixStream::connect(&socket).with_context(|| socket.display().to_string())?;
    silent.set_read_timeout(Some(PATIENTLY))?;
    let mut heard = Vec::new();
    silent
        .read_to_end(&mut heard)
        .context("it is waited for longer than anybody should be")?;
    let heard = String::from_utf8_lossy(&heard);
    ensure!(heard.contains("goes on"), "expected to be told, saw {heard:?}");
    succeed(mesh, node)?.wait(PATIENTLY)?;
    mesh.wait_for_tunnel("client", "server")
}

/// Of a connection that is open when the mesh leaves the node: it goes on for the drain, and then it ends at both Pods before anything of
/// it finds another way.
pub fn uninstalled_under_a_connection(shared: &mut Shared) -> Result<()> {
    const DRAIN: &str = "1";
    let mesh = &mut shared.mesh;
    let node = NodeName::Two;
    let talk = Talk::begin(mesh, "client", "server")?;
    let place = mesh.topology.node(node);
    let (pin_path, no_cni) = (place.pin_path(), place.folder.join("no-cni"));
    let (pin_path, no_cni) = (pin_path.to_str().context("a path")?, no_cni.to_str().context("a path")?);
    let cgroup = place.cgroup.path().to_str().context("a path")?.to_owned();
    let gone = mesh.take_agent(node)?;
    let output = mesh.agent_command(
        node,
        "uninstall",
        &[
            "--pin-path",
            pin_path,
            "--cgroup-root",
            &cgroup,
            "--cni-conf-dir",
            no_cni,
            "--cni-bin-dir",
            no_cni,
            "--node",
            node.as_str(),
            "--drain-seconds",
            DRAIN,
        ],
    )?;
    ensure!(output.contains("Pods released"), "{output}");
    talk.end("the mesh left the node")?;
    gone.wait(PATIENTLY)?;
    // As before, for the checks that come.
    mesh.launch_agent(node)?;
    mesh.wait_until_ready(node)?;
    let meshed: Vec<&str> = PODS
        .iter()
        .filter(|pod| pod.meshed && pod.node == node)
        .map(|pod| pod.name)
        .collect();
    meshed.iter().try_for_each(|pod| mesh.enroll(pod))?;
    mesh.wait_for_tunnel("client", "server")
}

/// An uninstaller that is killed once it has said that the mesh leaves the node: the agent that goes on stays, and so does the next one,
/// by whose start the one before must not take the node for left.
pub fn departure_broken_off(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    let node = NodeName::Two;
    let run_dir = mesh.topology.node(node).run_dir();
    let leaving = run_dir.join("leaving");
    std::fs::write(&leaving, "")?;
    // Its end is all that the agent sees of it.
    drop(UnixStream::connect(run_dir.join("handover.sock"))?);
    poll::until_true("the agent that goes on stays", SOON, || Ok(!leaving.exists()))?;

    std::fs::write(&leaving, "")?;
    let gone = succeed(mesh, node)?;
    mesh.wait_until_ready(node)?;
    ensure!(!leaving.exists(), "the agent before takes the node for left by the mesh");
    gone.wait(PATIENTLY)?;
    mesh.wait_for_tunnel("client", "server")
}

/// A Pod that the successor releases has nothing to do with the mesh any more, and the agent of before lets go of it as well.
pub fn released_while_draining(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    let node = NodeName::Two;
    mesh.add_pod(&PodSpec {
        name: "passing",
        node,
        host: 50,
        meshed: true,
        annotations: "",
    })?;
    mesh.wait_for_tunnel("client", "passing")?;
    let mut stays = mesh.app.chat(&mesh.pod("client").place(), mesh.pod("server").v4.into())?;
    let mut goes = mesh.app.chat(&mesh.pod("client").place(), mesh.pod("passing").v4.into())?;
    let gone = succeed(mesh, node)?;
    ensure!(goes.ask("drains", SOON)? == "drains");
    mesh.release("passing")?;
    // Its rules and routes are gone by now: whatever the agent of before still carried would be answered in clear.
    let said = tail(&mesh.topology.node(node).folder.join("mesh-agent.log"), 100);
    ensure!(
        said.contains("released while this agent drains"),
        "it was released before the agent that drains has cut it"
    );
    let end = goes.hear(SOON).context("the connection of a released Pod goes on")?;
    ensure!(end.contains("error"), "expected a reset, saw {end}");
    ensure!(
        stays.ask("still", SOON)? == "still",
        "another Pod's connection was cut as well"
    );
    drop((stays, goes));
    gone.wait(PATIENTLY)?;
    mesh.registry.remove("pod-passing.yaml")?;
    mesh.stop_server("passing");
    mesh.topology.remove_pod("passing");
    mesh.wait_for_tunnel("client", "server")
}
