//! Agents and the control plane that die and come back, and leaving no trace.

use std::net::IpAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::app::ECHO_PORT;
use mesh_tests::demo::PODS;
use mesh_tests::manifests::policy;
use mesh_tests::mesh::Mesh;
use mesh_tests::poll::SOON;
use mesh_tests::snapshot;
use mesh_tests::suite;
use mesh_tests::topology::NodeName;

const QUICKLY: Duration = Duration::from_secs(1);

struct Shared {
    mesh: Mesh,
}

fn main() -> ExitCode {
    suite::run(
        "lifecycle",
        || {
            Ok(Shared {
                mesh: Mesh::start(&PODS, &mut |_| {})?,
            })
        },
        |shared, error| shared.mesh.with_logs(error),
        &[
            ("without_its_control_plane_the_mesh_goes_on", control_plane_killed),
            ("a_killed_source_agent_refuses_until_it_is_back", source_agent_killed),
            (
                "a_killed_destination_agent_refuses_until_it_is_back",
                destination_agent_killed,
            ),
            ("an_agent_that_is_stopped_comes_back", agent_stopped),
            ("a_hung_agent_refuses", agent_hung),
            ("a_pod_that_ended_without_its_agent_is_forgotten", pod_gone),
            ("cleanup_without_an_agent_leaves_nothing", cleanup),
        ],
    )
}

fn control_plane_killed(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    let server: IpAddr = mesh.pod("server").v4.into();
    let mut chat = mesh.app.chat(&mesh.pod("client").place(), server)?;
    ensure!(chat.ask("before", SOON)? == "before");
    mesh.kill_control();
    ensure!(
        chat.ask("without", SOON)? == "without",
        "an existing connection does not outlive the control plane"
    );
    for address in mesh.pod("server").addresses() {
        mesh.app
            .connect(&mesh.pod("client").place(), address, ECHO_PORT)?
            .expect_ok()
            .context("a new connection")?;
    }
    let rule = format!("[{{ to: [{{ ports: [{ECHO_PORT}] }}] }}]");
    mesh.registry.write("deny.yaml", &policy("deny", "server", "Deny", &rule))?;
    mesh.app
        .connect(&mesh.pod("client").place(), server, ECHO_PORT)?
        .expect_ok()
        .context("with nobody to tell of a policy")?;
    mesh.start_control()?;
    mesh.wait_for_outcome("client", server, ECHO_PORT, false)?;
    mesh.registry.remove("deny.yaml")?;
    mesh.wait_for_outcome("client", server, ECHO_PORT, true)
}

/// Kills the agent of a node, checks that connections to these are refused, starts it, and checks that they work.
fn kill_and_restart(mesh: &mut Mesh, node: NodeName, to: &[&str]) -> Result<()> {
    mesh.kill_agent(node);
    for server in to {
        for address in mesh.pod(server).addresses() {
            let attempt = mesh.app.connect(&mesh.pod("client").place(), address, ECHO_PORT)?;
            attempt
                .expect_refused(QUICKLY)
                .with_context(|| format!("client → {server} ({address})"))?;
        }
    }
    mesh.start_agent(node)?;
    for server in to {
        mesh.wait_for_tunnel("client", server)?;
    }
    Ok(())
}

fn source_agent_killed(shared: &mut Shared) -> Result<()> {
    kill_and_restart(&mut shared.mesh, NodeName::One, &["server", "local"])
}

fn destination_agent_killed(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    let server: IpAddr = mesh.pod("server").v6.into();
    mesh.app
        .connect(&mesh.pod("outsider").place(), server, ECHO_PORT)?
        .expect_ok()?;
    kill_and_restart(mesh, NodeName::Two, &["server"])?;
    // The one outside the mesh was closed out as well, and is back.
    mesh.wait_for_outcome("outsider", server, ECHO_PORT, true)
}

fn agent_stopped(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    mesh.terminate_agent(NodeName::One)?;
    let server: IpAddr = mesh.pod("server").v4.into();
    mesh.app
        .connect(&mesh.pod("client").place(), server, ECHO_PORT)?
        .expect_refused(QUICKLY)?;
    mesh.start_agent(NodeName::One)?;
    mesh.wait_for_tunnel("client", "server")
}

fn agent_hung(shared: &mut Shared) -> Result<()> {
    use nix::sys::signal::{Signal, kill};
    let mesh = &mut shared.mesh;
    let id = mesh.agent_id(NodeName::One).context("the agent runs")?;
    let process = nix::unistd::Pid::from_raw(i32::try_from(id)?);
    kill(process, Signal::SIGSTOP)?;
    // Its listeners still accept in the kernel; the heartbeat's lease (5 s) is what tells. Until then connections hang.
    std::thread::sleep(Duration::from_secs(6));
    let server: IpAddr = mesh.pod("server").v4.into();
    let attempt = mesh.app.connect(&mesh.pod("client").place(), server, ECHO_PORT);
    kill(process, Signal::SIGCONT)?;
    attempt?.expect_refused(QUICKLY)?;
    mesh.wait_for_outcome("client", server, ECHO_PORT, true)
}

fn pod_gone(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    mesh.kill_agent(NodeName::One);
    mesh.stop_server("local");
    mesh.registry.remove("pod-local.yaml")?;
    mesh.topology.remove_pod("local");
    mesh.start_agent(NodeName::One)?;
    let pods = mesh.agent_command(NodeName::One, "list", &[])?;
    ensure!(
        !pods.contains("local"),
        "the agent still lists the Pod whose namespace is gone:\n{pods}"
    );
    ensure!(pods.contains("client"), "the agent forgot a Pod that lives:\n{pods}");
    mesh.wait_for_tunnel("client", "server")
}

fn cleanup(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    // What the Pod looked like before: another Pod of the node that was never enrolled differs by its addresses only.
    mesh.kill_agent(NodeName::Two);
    mesh.cleanup(NodeName::Two)?;
    let after = snapshot::of(&mesh.pod("server").netns)?;
    for trace in [
        ":15001",
        ":15006",
        ":15008",
        "tcp_fwmark_accept = 1",
        "fwmark_reflect = 1",
        "fwmark 0x",
    ] {
        ensure!(!after.contains(trace), "cleanup left {trace} in the Pod:\n{after}");
    }
    // The file system has entries of the kernel's own; the agent's are all below its pin path.
    let pin_path = mesh.topology.node(NodeName::Two).pin_path();
    let pins: Vec<_> = std::fs::read_dir(&pin_path)
        .map(|entries| entries.flatten().collect())
        .unwrap_or_default();
    ensure!(pins.is_empty(), "cleanup left {pins:?} pinned");
    // Nothing captures any more: connections are direct again.
    let outsider = mesh.pod("outsider").v4;
    mesh.app
        .connect(&mesh.pod("server").place(), outsider.into(), ECHO_PORT)?
        .expect_ok()
        .map(drop)
}
