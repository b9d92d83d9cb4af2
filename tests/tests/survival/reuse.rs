//! An address that goes from one identity to the next within a second, on the same node and to another one, while clients go on
//! connecting to it and from it: no byte under the identity of the Pod before.

use std::collections::{HashMap, VecDeque};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::access_log::{Position, text};
use mesh_tests::app::HTTP_PORT;
use mesh_tests::manifests::{pod_uid, policy, principal, spiffe_id};
use mesh_tests::mesh::{Mesh, PodSpec};
use mesh_tests::poll;
use mesh_tests::process::{Process, tail};
use mesh_tests::suite;
use mesh_tests::topology::{NodeName, WORLD_V4};
use serde_json::Value;

use super::{PATIENTLY, Shared};

/// What each Pod gets in its turn.
const REUSED: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::new(10, 61, 1, 40), Ipv6Addr::new(0xfd61, 1, 0, 0, 0, 0, 0, 40));
/// Requests that are waited for at each step.
const SOME: usize = 10;

const FIRST: PodSpec = PodSpec {
    name: "first",
    node: NodeName::One,
    host: 40,
    meshed: true,
    annotations: "",
};
const SECOND: PodSpec = PodSpec { name: "second", ..FIRST };
const THIRD: PodSpec = PodSpec {
    name: "third",
    node: NodeName::Two,
    ..FIRST
};

pub fn address_reused(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    let rules = format!("[{{ from: [{{ principals: [\"{}\"] }}] }}]", principal("first"));
    mesh.registry
        .write("only-first.yaml", &policy("only-first", "server", "Allow", &rules))?;
    let positions = NodeName::ALL.map(|node| mesh.access_log(node).position());
    let reused: [SocketAddr; 2] = [(REUSED.0, HTTP_PORT).into(), (REUSED.1, HTTP_PORT).into()];
    let server = SocketAddr::new(mesh.pod("server").v4.into(), HTTP_PORT);
    let local = SocketAddr::new(mesh.pod("local").v6.into(), HTTP_PORT);

    mesh.add_pod_at(&FIRST, REUSED)?;
    let towards = [
        Insistence::start(mesh, "client", reused[0], "to-v4")?,
        Insistence::start(mesh, "client", reused[1], "to-v6")?,
    ];
    let from_first = Insistence::start(mesh, "first", server, "from-first")?;
    wait_for_all(&towards, "first")?;
    from_first.wait_for_answers("server")?;

    // On the same node, in order: released, then made anew.
    let mut gone = vec![from_first.stop()];
    let start = Instant::now();
    mesh.delete_pod("first")?;
    mesh.add_pod_at(&SECOND, REUSED)?;
    say_how_soon("on the same node", start);
    let from_second = Insistence::start(mesh, "second", server, "from-second")?;
    wait_for_all(&towards, "second")?;
    from_second.wait_for_refusals()?;

    // On the other node, and the client's node does not hear of it: nobody has released the Pod before, nor told this node that
    // its address is another's.
    cut_off(mesh, "add")?;
    gone.push(from_second.stop());
    let start = Instant::now();
    mesh.stop_server("second");
    mesh.registry.remove("pod-second.yaml")?;
    mesh.topology.remove_pod("second");
    mesh.add_pod_at(&THIRD, REUSED)?;
    say_how_soon("on the other node", start);
    let stale = NodeName::ALL.map(|node| mesh.access_log(node).position());
    let from_third = Insistence::start(mesh, "third", server, "from-third")?;
    let to_stale = Insistence::start(mesh, "third", local, "to-stale")?;
    from_third.wait_for_refusals()?;
    to_stale.wait_for_refusals()?;
    for insistence in &towards {
        insistence.wait_for_refusals()?;
    }
    let lines = mesh.access_log(NodeName::One).since(
        stale[0],
        &[
            ("direction", "outbound"),
            ("destination_principal", &spiffe_id("second")),
            ("path", "tunnel"),
            ("result", "refused"),
        ],
    );
    ensure!(!lines.is_empty(), "the client's node was to be stale, and was not");
    let refused = [
        ("direction", "inbound"),
        ("source_principal", &spiffe_id("third")),
        ("result", "refused"),
        ("reason", "identity_mismatch"),
    ];
    let lines = mesh.access_log(NodeName::One).since(stale[0], &refused);
    ensure!(!lines.is_empty(), "the destination's node was to be stale, and was not");
    for (at, from) in [("third", "to-v"), ("local", "to-stale")] {
        let received = received_by(mesh, at)?;
        ensure!(
            !received.iter().any(|token| token.starts_with(from)),
            "{at} was reached by who was told of another there: {received:?}"
        );
    }
    // As late as it may come.
    mesh.agent_command(NodeName::One, "release", &["--uid", &pod_uid("second")])?;
    cut_off(mesh, "del")?;
    wait_for_all(&towards, "third").context("with the control plane back")?;
    to_stale.wait_for_answers("local").context("with the control plane back")?;
    from_third.wait_for_refusals()?;

    gone.extend(towards.map(Insistence::stop));
    gone.extend([from_third, to_stale].map(Insistence::stop));
    expect_identities(mesh, positions, &gone)?;
    for (pod, foreign) in [("server", "from-second"), ("server", "from-third")] {
        let received = received_by(mesh, pod)?;
        ensure!(
            !received.iter().any(|token| token.starts_with(foreign)),
            "{pod} is for the first alone, and received from {foreign}: {received:?}"
        );
    }
    mesh.delete_pod("third")?;
    mesh.registry.remove("only-first.yaml")?;
    mesh.wait_for_tunnel("client", "server")
}

/// Enrolment included: the address itself is there before. Said and not asserted, for the machine may have other work.
fn say_how_soon(place: &str, since: Instant) {
    let seconds = since.elapsed().as_secs_f32();
    suite::say(&format!(
        "{place}: another Pod with the address is in the mesh {seconds:.1} s after the end of the one before began"
    ));
}

/// Between the first node and the control plane nothing passes, either way.
fn cut_off(mesh: &Mesh, change: &str) -> Result<()> {
    let node = NodeName::One;
    let (to, from) = (WORLD_V4, node.addresses().0);
    let world = mesh.topology.world();
    for (netns, address) in [(&mesh.topology.node(node).netns, to), (world, from)] {
        netns.batch(&[format!("route {change} blackhole {address}/32")])?;
    }
    Ok(())
}

fn wait_for_all(insistences: &[Insistence], server: &str) -> Result<()> {
    insistences
        .iter()
        .try_for_each(|insistence| insistence.wait_for_answers(server))
}

/// A client in a Pod that makes one request after the other.
struct Insistence {
    pod: &'static str,
    process: Process,
    log: PathBuf,
}

/// One that has ended: of which Pod, and what it saw.
struct Ended {
    pod: &'static str,
    reports: Vec<Value>,
}

impl Insistence {
    fn start(mesh: &Mesh, pod: &'static str, to: SocketAddr, token: &str) -> Result<Self> {
        let log = mesh.topology.folder().join(format!("insist-{token}.log"));
        let command = mesh
            .pod(pod)
            .place()
            .command(mesh.app.binary(), &["insist", &to.to_string(), token])?;
        let process = Process::start(token, command, log.clone())?;
        Ok(Self { pod, process, log })
    }

    fn stop(self) -> Ended {
        let Self { pod, process, log } = self;
        process.kill();
        Ended {
            pod,
            reports: reports(&log),
        }
    }

    fn wait_for(&self, what: &str, counts: impl Fn(&Value) -> bool) -> Result<()> {
        let before = reports(&self.log).len();
        let enough = || reports(&self.log).into_iter().skip(before).filter(&counts).count() >= SOME;
        poll::until_true(&format!("{} {what}", self.process.name()), PATIENTLY, || Ok(enough()))
            .with_context(|| tail(&self.log, 5))
    }

    fn wait_for_answers(&self, server: &str) -> Result<()> {
        let begin = format!("server={server} ");
        self.wait_for(&format!("is answered by {server}"), |report| {
            text(report, "answer").starts_with(&begin)
        })
    }

    fn wait_for_refusals(&self) -> Result<()> {
        self.wait_for("is refused", |report| report.get("error").is_some())
    }
}

fn reports(log: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// The tokens of the requests that came to a Pod's application, answered or not.
fn received_by(mesh: &Mesh, pod: &str) -> Result<Vec<String>> {
    let log = std::fs::read_to_string(mesh.topology.folder().join(format!("{pod}.log")))?;
    let begin = format!("{pod} received /");
    let paths = log.lines().filter_map(|line| line.strip_prefix(&begin)?.split(' ').next());
    Ok(paths.map(str::to_owned).collect())
}

/// Whatever an application received by a tunnel came under the identities of those two Pods that were its ends.
fn expect_identities(mesh: &Mesh, positions: [Position; 2], ended: &[Ended]) -> Result<()> {
    let outbound = NodeName::ALL.into_iter().zip(positions);
    let outbound = outbound.flat_map(|(node, position)| mesh.access_log(node).since(position, &[("direction", "outbound")]));
    // A port is soon used again: by the order of those who have it.
    let mut by_source: HashMap<String, VecDeque<Value>> = HashMap::new();
    for line in outbound {
        by_source.entry(text(&line, "source_address")).or_default().push_back(line);
    }
    let receivers = ["first", "second", "third", "server", "local"];
    let mut received = HashMap::new();
    for pod in receivers {
        received.extend(received_by(mesh, pod)?.into_iter().map(|token| (token, pod)));
    }
    let mut by_tunnel = 0;
    for Ended { pod, reports } in ended {
        for report in reports {
            let line = by_source.get_mut(&text(report, "local")).and_then(VecDeque::pop_front);
            let token = text(report, "token");
            let Some(receiver) = received.get(&token) else {
                ensure!(
                    report.get("error").is_some(),
                    "{token} was received by nobody, and answered: {report}"
                );
                continue;
            };
            // Before the agent knew whom it wrote to, in clear to one that was never proven: under no identity.
            let line = line.with_context(|| format!("no access-log line of {report}, which {receiver} received"))?;
            let (path, principal) = (text(&line, "path"), text(&line, "destination_principal"));
            let expected = if path == "tunnel" {
                spiffe_id(receiver)
            } else {
                String::new()
            };
            ensure!(
                principal == expected,
                "{receiver} received {token} under the name of {principal:?}: {line}"
            );
            let source = text(&line, "source_principal");
            let expected = if path == "tunnel" { spiffe_id(pod) } else { String::new() };
            ensure!(source == expected, "{pod} sent {token} under the name of {source:?}: {line}");
            by_tunnel += usize::from(path == "tunnel");
        }
    }
    ensure!(by_tunnel >= 6 * SOME, "only {by_tunnel} requests went by tunnel");
    Ok(())
}
