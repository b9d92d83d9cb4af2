//! No tenant starves a node: one Pod takes all that it may, and another one on its node goes on.
#![allow(clippy::print_stdout, reason = "a test: standard output is its report")]

use std::net::{IpAddr, SocketAddr};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::app::ECHO_PORT;
use mesh_tests::mesh::{Mesh, PodSpec};
use mesh_tests::poll;
use mesh_tests::process::{Conversation, Process};
use mesh_tests::suite;
use mesh_tests::topology::NodeName;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::Value;

/// What a Pod may have at a time; as documented.
const CONNECTIONS_PER_POD: usize = 20_000;
const TOO_MANY: usize = 200;
/// Clients of the greedy Pod that connect at the same time.
const THREADS: usize = 16;
const HOLD_PORT: u16 = 9900;
/// What an agent keeps for itself of its descriptors; half of the rest is at most one Pod's, and a connection has two. As documented.
const DESCRIPTORS_RESERVED: usize = 1_024;
/// Of an application beside its connections.
const OTHER_DESCRIPTORS: usize = 100;
/// For 20,000 connections by debug binaries on two busy cores; they take a minute.
const LONG: Duration = Duration::from_secs(400);
const BULK_BYTES: usize = 4 << 20;

const PODS: [PodSpec; 4] = [
    PodSpec::new("greedy", NodeName::One, 10, true),
    PodSpec::new("neighbour", NodeName::One, 11, true),
    PodSpec::new("server", NodeName::Two, 20, true),
    PodSpec::new("second", NodeName::Two, 21, true),
];

fn main() -> ExitCode {
    suite::run(
        "starvation",
        || {
            // The applications are not privileged, and inherit it. Where it cannot be raised, an agent lets a Pod have fewer.
            let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
            let wanted = hard.max((CONNECTIONS_PER_POD + OTHER_DESCRIPTORS) as u64);
            let _ = setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted);
            Mesh::start(&PODS, &mut |_| {})
        },
        Mesh::with_logs,
        &[
            ("a_neighbour_of_a_pod_with_all_its_connections_goes_on", all_its_connections),
            ("an_agent_without_descriptors_counts_it_and_recovers", no_descriptors),
        ],
    )
}

/// Bytes there and back, all of them, over a connection of their own.
fn moves_data(mesh: &Mesh, from: &str, to: IpAddr) -> Result<()> {
    let report = mesh.app.bulk(&mesh.pod(from).place(), to, BULK_BYTES)?;
    ensure!(
        report["received"] == BULK_BYTES && report["sent_sha256"] == report["received_sha256"],
        "{from} → {to}: {report}"
    );
    Ok(())
}

fn resident_mb(mesh: &Mesh, node: NodeName) -> Result<u64> {
    let id = mesh.agent_id(node).context("an agent runs")?;
    let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("VmRSS")?;
    let kb: u64 = line.split_whitespace().nth(1).context("a number")?.parse()?;
    Ok(kb / 1024)
}

fn descriptor_limit(id: u32) -> Result<usize> {
    let limits = std::fs::read_to_string(format!("/proc/{id}/limits"))?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let soft = line.and_then(|line| line.split_whitespace().next());
    Ok(soft.context("the limit of open files")?.parse()?)
}

/// What the node's agent lets a Pod have, with the descriptors that it has.
fn connections_per_pod(mesh: &Mesh, node: NodeName) -> Result<usize> {
    let id = mesh.agent_id(node).context("an agent runs")?;
    let descriptors = descriptor_limit(id)?;
    Ok(CONNECTIONS_PER_POD.min((descriptors - DESCRIPTORS_RESERVED) / 2 / 2))
}

fn all_its_connections(mesh: &mut Mesh) -> Result<()> {
    let mesh = &*mesh;
    let most = connections_per_pod(mesh, NodeName::One)?;
    let (own, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if most + OTHER_DESCRIPTORS > usize::try_from(own)? {
        return Err(suite::skip(&format!("an application may have only {own} descriptors")));
    }
    let folder = mesh.topology.folder();
    let port = HOLD_PORT.to_string();
    let mut servers = Vec::new();
    for name in ["server", "second"] {
        let serve = mesh.pod(name).place().command(mesh.app.binary(), &["hold-serve", &port])?;
        servers.push(Process::start(
            "a server that holds",
            serve,
            folder.join(format!("hold-{name}.log")),
        )?);
    }
    for (name, server) in ["server", "second"].into_iter().zip(&mut servers) {
        mesh.wait_for_tunnel("neighbour", name)?;
        mesh.wait_for_tunnel("greedy", name)?;
        server.check_running()?;
    }
    let open_of = |pod: &str| -> Result<f64> {
        let labels = [("reporter", "source"), ("source_workload", pod)];
        let opened = mesh.metric(NodeName::One, "mesh_tcp_connections_opened_total", &labels)?;
        Ok(opened - mesh.metric(NodeName::One, "mesh_tcp_connections_closed_total", &labels)?)
    };
    let limited = || {
        let labels = [("source_workload", "greedy"), ("reason", "limit")];
        mesh.metric(NodeName::One, "mesh_tcp_connections_failed_total", &labels)
    };
    ensure!(limited()? == 0.0);

    let count = (CONNECTIONS_PER_POD + TOO_MANY).to_string();
    let addresses = ["server", "second"].map(|name| SocketAddr::new(mesh.pod(name).v4.into(), HOLD_PORT).to_string());
    let threads = THREADS.to_string();
    let arguments = ["hold", &count, &threads, &addresses[0], &addresses[1]];
    let greedy = Conversation::start(mesh.pod("greedy").place().command(mesh.app.binary(), &arguments)?)?;
    let (start, over) = (Instant::now(), AtomicBool::new(false));
    // While the connections come, and when they are there.
    let (report, visits) = std::thread::scope(|scope| {
        let neighbour = scope.spawn(|| -> Result<(usize, Duration)> {
            let (mut visits, mut slowest) = (0, Duration::ZERO);
            while !over.load(Ordering::Relaxed) {
                let to = ["server", "second"][visits % 2];
                for address in mesh.pod(to).addresses() {
                    let attempt = mesh.app.connect(&mesh.pod("neighbour").place(), address, ECHO_PORT)?;
                    slowest = slowest.max(attempt.expect_ok().context("the neighbour")?.elapsed());
                    moves_data(mesh, "neighbour", address)?;
                }
                visits += 1;
            }
            Ok((visits, slowest))
        });
        let report = greedy.hear(LONG);
        over.store(true, Ordering::Relaxed);
        (report, neighbour.join())
    });
    let (visits, slowest) = visits.map_err(|_| anyhow::anyhow!("the neighbour's thread panicked"))??;
    let report: Value = serde_json::from_str(&report.context("the greedy Pod's connections")?)?;
    println!(
        "{report} after {:.0} s; meanwhile {visits} visits of the neighbour, the slowest connection {slowest:?}",
        start.elapsed().as_secs_f32()
    );
    let held = report["held"].as_u64().context("a number")?;
    ensure!(held == most as u64, "expected {most} to be held, saw {report}");
    let (refused, expected) = (limited()?, CONNECTIONS_PER_POD + TOO_MANY - most);
    ensure!(
        refused == expected as f64,
        "expected {expected} to be refused and counted, saw {refused}"
    );
    ensure!(open_of("greedy")? == held as f64, "expected {held} to be counted as open");
    ensure!(visits > 0, "the neighbour was never asked");

    for address in mesh.pod("server").forms() {
        mesh.app
            .connect(&mesh.pod("neighbour").place(), address, ECHO_PORT)?
            .expect_ok()?;
        moves_data(mesh, "neighbour", address)?;
        mesh.app
            .connect(&mesh.pod("greedy").place(), address, ECHO_PORT)?
            .expect_refused(Duration::from_secs(5))
            .context("one more of the greedy Pod")?;
    }
    moves_data(mesh, "server", mesh.pod("neighbour").v4.into())?;
    for node in NodeName::ALL {
        println!("{}'s agent: {} MB resident", node.as_str(), resident_mb(mesh, node)?);
    }
    // Both ends: a server that goes on holding has only been told that its client sends nothing more.
    drop((greedy, servers));
    poll::until_true("they are gone", LONG, || Ok(open_of("greedy")? == 0.0))?;
    mesh.wait_for_outcome("greedy", mesh.pod("server").v4.into(), ECHO_PORT, true)
}

/// The agent's soft limit of open descriptors, changed while it runs.
fn limit_descriptors(id: u32, soft: usize) -> Result<()> {
    let status = Command::new("prlimit")
        .args(["--pid", &id.to_string(), &format!("--nofile={soft}:")])
        .status()
        .context("prlimit")?;
    ensure!(status.success(), "prlimit ended with {status}");
    Ok(())
}

fn descriptors(id: u32) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{id}/fd"))?.count())
}

/// Nothing can be accepted then, by anybody; when there are some again, who waited is served.
fn no_descriptors(mesh: &mut Mesh) -> Result<()> {
    const ROOM: usize = 30;
    const WANTED: usize = 200;
    let mesh = &*mesh;
    let id = mesh.agent_id(NodeName::One).context("an agent runs")?;
    let port = HOLD_PORT.to_string();
    let serve = mesh
        .pod("server")
        .place()
        .command(mesh.app.binary(), &["hold-serve", &port])?;
    let server = Process::start("a server that holds", serve, mesh.topology.folder().join("hold-few.log"))?;
    mesh.wait_for_tunnel("greedy", "server")?;
    let errors = || mesh.metric(NodeName::One, "mesh_accept_errors_total", &[("listener", "outbound")]);
    let before = errors()?;
    let address = SocketAddr::new(mesh.pod("server").v4.into(), HOLD_PORT).to_string();
    let arguments = ["hold", &WANTED.to_string(), &WANTED.to_string(), &address];
    let all = descriptor_limit(id)?;
    let most = descriptors(id)? + ROOM;
    limit_descriptors(id, most)?;
    let greedy = Conversation::start(mesh.pod("greedy").place().command(mesh.app.binary(), &arguments)?)?;
    poll::until_true("all descriptors are taken", poll::SOON, || Ok(descriptors(id)? >= most - 1))?;
    // Longer than the agent waits between two attempts to accept.
    std::thread::sleep(Duration::from_millis(500));
    limit_descriptors(id, all)?;
    let report: Value = serde_json::from_str(&greedy.hear(LONG)?)?;
    let (held, failed) = (report["held"].as_u64().unwrap_or(0), &report["failed"]);
    println!("{report}");
    let refused: u64 = failed
        .as_object()
        .context("failures")?
        .values()
        .filter_map(Value::as_u64)
        .sum();
    ensure!(held > 0 && held + refused == WANTED as u64, "{report}");
    ensure!(
        failed
            .as_object()
            .is_some_and(|kinds| kinds.keys().all(|kind| kind == "ConnectionReset")),
        "expected that who is not served is refused, saw {report}"
    );
    let after = errors()?;
    ensure!(
        after > before,
        "expected failed accepts to be counted, saw {before} and {after}"
    );
    for address in mesh.pod("server").forms() {
        mesh.app
            .connect(&mesh.pod("neighbour").place(), address, ECHO_PORT)?
            .expect_ok()?;
    }
    drop((greedy, server));
    mesh.wait_for_outcome("greedy", mesh.pod("server").v4.into(), ECHO_PORT, true)
}
