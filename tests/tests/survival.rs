//! What a node goes through without its connections: agents killed while the control plane is away, restarts under load, crashes
//! without end, addresses that change hands.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::app::ECHO_PORT;
use mesh_tests::demo::PODS;
use mesh_tests::manifests::policy;
use mesh_tests::mesh::Mesh;
use mesh_tests::poll::{self, SOON};
use mesh_tests::process::{Process, tail};
use mesh_tests::snapshot;
use mesh_tests::suite;
use mesh_tests::topology::NodeName;
use nix::sys::signal::Signal;
use serde_json::Value;

/// Where the agent first waits for something better.
const PATIENTLY: Duration = Duration::from_secs(40);
const ADMIN_PORT: u16 = 15000;
const READY_PORT: u16 = 15021;
const LOAD_PORT: u16 = 9900;

struct Shared {
    mesh: Mesh,
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
            ("agents_that_take_over_from_each_other_fail_no_connection", graceful_restarts),
            ("connections_outlive_a_takeover_up_to_the_drains_limit", drain),
            ("an_agent_that_does_not_answer_is_not_replaced", hung_agent_keeps_its_folder),
            ("crashes_leave_nothing_behind", crashes),
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

/// Connections, one after the other in each of a few threads, each with a message and its echo, until it is finished.
struct Load {
    process: Option<Process>,
    log: PathBuf,
    stop: PathBuf,
    _server: Process,
}

impl Load {
    fn start(mesh: &Mesh, from: &str, to: &str) -> Result<Self> {
        let folder = mesh.topology.folder();
        let binary = mesh.app.binary();
        let serve = mesh
            .pod(to)
            .place()
            .command(binary, &["load-serve", &LOAD_PORT.to_string()])?;
        let server = Process::start("the load's server", serve, folder.join("load-server.log"))?;
        let name = format!("load-{:016x}", rand::random::<u64>());
        let (log, stop) = (folder.join(format!("{name}.log")), folder.join(format!("{name}.stop")));
        let address = SocketAddr::new(mesh.pod(to).v4.into(), LOAD_PORT);
        let script = format!(
            "while [ ! -e {} ]; do {} load-connects {address} 2 50 2>&1; done",
            stop.display(),
            binary.display()
        );
        let command = mesh.pod(from).place().command("/bin/sh".as_ref(), &["-c", &script])?;
        let process = Process::start("the load", command, log.clone())?;
        let load = Self {
            process: Some(process),
            log,
            stop,
            _server: server,
        };
        // Its first connections may meet a server that does not listen yet.
        poll::until_true("the load flows", SOON, || Ok(load.report()?.0 > 0))?;
        std::fs::write(&load.log, "")?;
        Ok(load)
    }

    /// Connections that worked, and lines that tell of one that did not.
    fn report(&self) -> Result<(u64, Vec<String>)> {
        let text = std::fs::read_to_string(&self.log)?;
        let (mut worked, mut failures) = (0, Vec::new());
        for line in text.lines() {
            match serde_json::from_str::<Value>(line)
                .ok()
                .and_then(|report| report["count"].as_u64())
            {
                Some(count) => worked += count,
                None => failures.push(line.to_owned()),
            }
        }
        Ok((worked, failures))
    }

    /// Until so many more have worked.
    fn wait_for(&self, more: u64) -> Result<()> {
        let before = self.report()?.0;
        poll::until_true("more connections are made", PATIENTLY, || {
            Ok(self.report()?.0 >= before + more)
        })
    }

    fn finish(mut self) -> Result<(u64, Vec<String>)> {
        std::fs::write(&self.stop, "")?;
        let process = self.process.take().context("it runs")?;
        process.wait(PATIENTLY)?;
        self.report()
    }
}

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

/// What an agent holds, and holds of the node, when nothing goes on: a number each.
fn traces(mesh: &Mesh, node: NodeName) -> Result<Vec<(String, usize)>> {
    let id = mesh.agent_id(node).context("an agent runs")?;
    let place = mesh.topology.node(node);
    let mut traces = vec![
        ("descriptors".to_owned(), std::fs::read_dir(format!("/proc/{id}/fd"))?.count()),
        ("pins".to_owned(), count_below(&place.pin_path())?),
        ("files of the run directory".to_owned(), count_below(&place.run_dir())?),
        ("cgroups".to_owned(), count_below(place.cgroup.path())?),
    ];
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

fn count_below(folder: &Path) -> Result<usize> {
    let mut count = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        count += 1;
        if entry.file_type()?.is_dir() {
            count += count_below(&entry.path())?;
        }
    }
    Ok(count)
}

/// Idle connections of before, in TIME_WAIT or in a pool, go away by themselves.
fn expect_traces(mesh: &Mesh, node: NodeName, before: &[(String, usize)]) -> Result<()> {
    let mut last = Vec::new();
    poll::until_true("what the agents hold is as before", PATIENTLY, || {
        last = traces(mesh, node)?;
        Ok(before.iter().zip(&last).all(|((_, before), (_, after))| after <= before))
    })
    .with_context(|| format!("before {before:?}, after {last:?}"))
}

fn cycles(variable: &str, default: usize) -> usize {
    std::env::var(variable)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

fn graceful_restarts(shared: &mut Shared) -> Result<()> {
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
        load.wait_for(200)?;
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
    ensure!(worked >= 200 * restarts as u64, "only {worked} connections");
    for (node, before) in NodeName::ALL.into_iter().zip(before) {
        expect_traces(mesh, node, &before?)?;
    }
    Ok(())
}

fn drain(shared: &mut Shared) -> Result<()> {
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

/// Two agents on one folder would share a datapath; who does not answer is not simply pushed aside.
fn hung_agent_keeps_its_folder(shared: &mut Shared) -> Result<()> {
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

fn crashes(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    let node = NodeName::Two;
    let crash = |mesh: &mut Mesh| -> Result<()> {
        mesh.kill_agent(node);
        mesh.start_agent(node)
    };
    crash(mesh)?;
    mesh.wait_for_tunnel("client", "server")?;
    let before = traces(mesh, node)?;
    for _ in 0..cycles("CULVERT_TEST_CRASHES", 20) {
        crash(mesh)?;
    }
    mesh.wait_for_tunnel("client", "server")?;
    expect_traces(mesh, node, &before)
}
