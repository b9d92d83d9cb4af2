//! What a node goes through without its connections: agents killed while the control plane is away, restarts under load, crashes
//! without end, addresses that change hands.

#[path = "survival/repair.rs"]
mod repair;
#[path = "survival/reuse.rs"]
mod reuse;
#[path = "survival/takeover.rs"]
mod takeover;
#[path = "survival/traces.rs"]
mod traces;

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::app::ECHO_PORT;
use mesh_tests::demo::PODS;
use mesh_tests::manifests::policy;
use mesh_tests::mesh::Mesh;
use mesh_tests::poll::{self, SOON};
use mesh_tests::suite;
use mesh_tests::topology::NodeName;
use serde_json::Value;

/// Where the agent first waits for something better.
const PATIENTLY: Duration = Duration::from_secs(40);
const ADMIN_PORT: u16 = 15000;
const READY_PORT: u16 = 15021;

struct Shared {
    mesh: Mesh,
}

/// Where a node's pins are: below the pin path.
fn pins(mesh: &Mesh, node: NodeName) -> PathBuf {
    let version = format!("v{}", mesh_common::STORAGE_VERSION);
    mesh.topology.node(node).pin_path().join(version)
}

/// Where a map is pinned, below a node's pins.
fn pin_of(map: &str) -> PathBuf {
    let folder = if mesh_common::MAPS_OF_ABI.contains(&map) {
        format!("abi{}", mesh_common::ABI_VERSION)
    } else {
        String::new()
    };
    PathBuf::from(folder).join(map)
}

fn main() -> ExitCode {
    suite::run(
        "survival",
        || {
            Ok(Shared {
                mesh: Mesh::start(&PODS, &mut |_| {})?,
            })
        },
        |shared, error| shared.mesh.with_logs(error),
        &[
            ("a_killed_agent_needs_no_control_plane_to_come_back", crash_memory),
            ("a_memory_that_is_not_its_own_is_refused", foreign_memory),
            (
                "agents_that_take_over_from_each_other_fail_no_connection",
                takeover::graceful_restarts,
            ),
            ("connections_outlive_a_takeover_up_to_the_drains_limit", takeover::drain),
            ("a_drain_ends", takeover::drain_ends),
            ("a_stopped_agent_drains_up_to_its_limit", takeover::stop_drains),
            ("a_silent_successor_is_not_waited_for", takeover::silent_successor),
            (
                "of_two_agents_each_tells_of_itself_and_the_first_waits_for_its_end",
                takeover::each_tells_of_itself,
            ),
            ("a_takeover_needs_no_control_plane", takeover::without_control_plane),
            (
                "a_pod_released_while_an_agent_drains_is_let_go",
                takeover::released_while_draining,
            ),
            (
                "what_is_said_while_the_mesh_leaves_a_node_is_never_in_clear",
                takeover::uninstalled_under_a_connection,
            ),
            (
                "what_an_uninstaller_that_was_killed_has_left_is_forgotten",
                takeover::departure_broken_off,
            ),
            (
                "an_agent_that_does_not_answer_is_not_replaced",
                takeover::hung_agent_keeps_its_folder,
            ),
            ("an_address_that_is_reused_carries_no_foreign_byte", reuse::address_reused),
            ("what_a_hand_takes_from_a_capture_is_put_back", repair::broken_by_hand),
            ("crashes_leave_nothing_behind", traces::crashes),
        ],
    )
}

fn dump(mesh: &Mesh, node: NodeName) -> Result<Value> {
    Ok(serde_json::from_str(
        &mesh.agent_page(node, ADMIN_PORT, "/config_dump")?.body,
    )?)
}

fn fingerprints(mesh: &Mesh, node: NodeName) -> Result<Vec<String>> {
    let dump = dump(mesh, node)?;
    let certificates = dump["certificates"].as_array().context("certificates")?;
    let mut all: Vec<String> = certificates.iter().map(|c| c["fingerprint"].to_string()).collect();
    all.sort();
    Ok(all)
}

/// What the node's agent has written down covers this policy.
fn wait_until_remembered(mesh: &Mesh, node: NodeName, policy: &str) -> Result<()> {
    let path = mesh.topology.node(node).run_dir().join("memory");
    poll::until_true(&format!("{} remembers {policy}", node.as_str()), SOON, || {
        let bytes = std::fs::read(&path).unwrap_or_default();
        Ok(bytes.windows(policy.len()).any(|window| window == policy.as_bytes()))
    })
}

fn crash_memory(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    let (server, local): (IpAddr, IpAddr) = (mesh.pod("server").v4.into(), mesh.pod("local").v4.into());
    let rule = format!("[{{ to: [{{ ports: [{ECHO_PORT}] }}] }}]");
    let deny = |name: &str| policy(&format!("deny-{name}"), name, "Deny", &rule);
    mesh.registry.write("deny.yaml", &deny("server"))?;
    mesh.wait_for_outcome("client", server, ECHO_PORT, false)?;
    for node in NodeName::ALL {
        wait_until_remembered(mesh, node, "deny-server")?;
    }
    let certificates =
        |mesh: &Mesh| -> Result<Vec<Vec<String>>> { NodeName::ALL.iter().map(|node| fingerprints(mesh, *node)).collect() };
    let before = certificates(mesh)?;
    ensure!(before.iter().all(|of| !of.is_empty()), "no certificates before: {before:?}");

    mesh.kill_control();
    for node in NodeName::ALL {
        mesh.kill_agent(node);
    }
    for node in NodeName::ALL {
        mesh.start_agent(node)?;
        let page = mesh.agent_page(node, READY_PORT, "/healthz/ready")?;
        ensure!(
            page.status == 200 && page.body.contains("from memory"),
            "expected that it says from where it knows, saw {page:?}"
        );
    }
    mesh.wait_for_tunnel("server", "client")?;
    mesh.wait_for_tunnel("client", "local")?;
    for address in mesh.pod("server").forms() {
        let attempt = mesh.app.connect(&mesh.pod("client").place(), address, ECHO_PORT)?;
        attempt
            .expect_refused(PATIENTLY)
            .context("a policy of before is no longer enforced")?;
    }
    let after = certificates(mesh)?;
    ensure!(
        before == after,
        "expected the certificates of before, {before:?}, saw {after:?}"
    );

    mesh.start_control()?;
    mesh.registry.write("deny.yaml", &deny("local"))?;
    mesh.wait_for_outcome("client", local, ECHO_PORT, false)
        .context("a policy that is new")?;
    mesh.wait_for_outcome("client", server, ECHO_PORT, true)
        .context("a policy that is gone")?;
    for node in NodeName::ALL {
        let page = mesh.agent_page(node, READY_PORT, "/healthz/ready")?;
        ensure!(
            page.status == 200 && !page.body.contains("memory"),
            "expected plain readiness, saw {page:?}"
        );
    }
    mesh.registry.remove("deny.yaml")?;
    mesh.wait_for_outcome("client", local, ECHO_PORT, true)
}

/// Closed, as an agent is that knows nothing; the certificates are not taken either.
fn foreign_memory(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    let server: IpAddr = mesh.pod("server").v4.into();
    mesh.kill_control();
    let [one, two] = NodeName::ALL.map(|node| mesh.topology.node(node).run_dir().join("memory"));
    let log = mesh.topology.node(NodeName::One).folder.join("mesh-agent.log");
    let own = std::fs::read(&one)?;
    let mut damaged = own.clone();
    damaged[own.len() / 2] ^= 1;
    for (content, reason) in [(std::fs::read(two)?, "other_node"), (damaged, "damaged")] {
        mesh.kill_agent(NodeName::One);
        std::fs::write(&one, content)?;
        let said = std::fs::read_to_string(&log)?.len();
        mesh.launch_agent(NodeName::One)?;
        poll::until_true("the agent answers that it is not ready", SOON, || {
            Ok(mesh.agent_page(NodeName::One, READY_PORT, "/healthz/ready")?.status == 503)
        })?;
        let text = std::fs::read_to_string(&log)?;
        ensure!(
            text[said..].contains(reason),
            "expected {reason} in the log, saw {}",
            &text[said..]
        );
        mesh.app
            .connect(&mesh.pod("client").place(), server, ECHO_PORT)?
            .expect_refused(PATIENTLY)?;
        let taken = fingerprints(mesh, NodeName::One)?;
        ensure!(
            taken.is_empty(),
            "certificates were taken from a memory that is refused: {taken:?}"
        );
    }
    mesh.start_control()?;
    mesh.wait_until_ready(NodeName::One)?;
    mesh.wait_for_tunnel("client", "server")
}
