//! The kubelet's probes under STRICT and under a policy that denies everybody: let in at the ports that a Pod declares, from the
//! kubelet's cgroup of the Pod's node, and nobody else's connections.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: a panic is its failure, and standard output its report"
)]

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::app::{ECHO_PORT, HTTP_PORT};
use mesh_tests::cgroup::Cgroup;
use mesh_tests::manifests::{ROOT_NAMESPACE, mesh_config, policy};
use mesh_tests::mesh::{Mesh, PodSpec};
use mesh_tests::poll::{self, SOON};
use mesh_tests::process::{Place, Process};
use mesh_tests::suite;
use mesh_tests::topology::NodeName;
use serde_json::Value;

const PODS: [PodSpec; 1] = [PodSpec::new("server", NODE, 20, true)];
const NODE: NodeName = NodeName::Two;
/// Of the kubelet that these tests play; nothing else of the node has it.
const KUBELET_CGROUP: &str = "kubelet.service";
/// Of the agent.
const ADMIN_PORT: u16 = 15000;
const QUICKLY: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    suite::run(
        "probes",
        || {
            let mut mesh = Mesh::start(&PODS, &mut |_| {})?;
            mesh.terminate_agent(NODE)?;
            mesh.launch_agent_with(NODE, &["--follow-pods"])?;
            mesh.wait_until_ready(NODE)?;
            // Nobody is let in, by two rules.
            mesh.registry
                .write("strict.yaml", &mesh_config(ROOT_NAMESPACE, "{ mtls: Strict }"))?;
            mesh.registry.write("deny.yaml", &policy("all", "server", "Deny", "[{}]"))?;
            declare(&mesh, "readinessProbe: { httpGet: { port: 8080 } }")?;
            Ok(mesh)
        },
        Mesh::with_logs,
        &[
            ("probes_pass_at_the_declared_port_alone", declared),
            ("a_process_that_imitates_the_kubelet_is_refused", imitation),
            ("who_is_only_called_kubelet_is_not_taken_for_it", named_so),
            ("probes_go_on_while_the_agent_is_dead_and_after_its_return", without_agent),
            ("a_kubelet_that_starts_again_is_found_again", restarted),
            ("of_a_cgroup_that_others_are_in_nobody_is_taken_for_the_kubelet", shared),
            ("a_cgroup_that_is_named_needs_no_process_of_that_name", named),
            ("without_a_declared_port_nothing_passes", undeclared),
        ],
    )
}

/// What the server's container has in its manifest beside its port.
fn declare(mesh: &Mesh, probes: &str) -> Result<()> {
    mesh.write_pod(&PODS[0])?;
    let file = "pod-server.yaml";
    let manifest = std::fs::read_to_string(mesh.registry.folder().join(file))?;
    let port = "ports: [{ containerPort: 8080 }]";
    ensure!(manifest.contains(port), "the manifest has no {port}: {manifest}");
    mesh.registry
        .write(file, &manifest.replace(port, &format!("{port}, {probes}")))
}

/// A kubelet as far as the agent can see: a process of that name in a cgroup of its own, and what else runs there.
struct Kubelet {
    _process: Process,
    place: Place,
    cgroup: Cgroup,
}

impl Kubelet {
    fn start(mesh: &Mesh) -> Result<Self> {
        let cgroup = mesh.topology.node(NODE).cgroup.child(KUBELET_CGROUP)?;
        let place = place_in(mesh, cgroup.path());
        let process = called_kubelet(mesh, "the-kubelet", &place, "10250")?;
        Ok(Self {
            _process: process,
            place,
            cgroup,
        })
    }

    fn is_known(mesh: &Mesh) -> Result<()> {
        poll::until_true("the agent knows the kubelet", SOON, || Ok(known_id(mesh)?.is_u64()))?;
        ensure!(
            mesh.metric(NODE, "mesh_kubelet_unknown", &[])? == 0.0,
            "the kubelet is known, and the metric says otherwise"
        );
        Ok(())
    }
}

/// A process of that name. `folder`: of its own, since a program that runs cannot be written.
fn called_kubelet(mesh: &Mesh, folder: &str, place: &Place, port: &str) -> Result<Process> {
    let folder = mesh.topology.node(NODE).folder.join(folder);
    std::fs::create_dir_all(&folder)?;
    let program = folder.join("kubelet");
    std::fs::copy(mesh.app.binary(), &program)?;
    let command = place.command(&program, &["hold-serve", port])?;
    Process::start("a process called kubelet", command, folder.join("log"))
}

/// The cgroup's, of the agent's dump; `null` while it knows none.
fn known_id(mesh: &Mesh) -> Result<Value> {
    let dump: Value = serde_json::from_str(&mesh.agent_page(NODE, ADMIN_PORT, "/config_dump")?.body)?;
    Ok(dump["kubelet"]["cgroup_id"].clone())
}

/// A process of root's on the node.
fn place_in(mesh: &Mesh, cgroup: &Path) -> Place {
    Place {
        cgroup: Some(cgroup.to_owned()),
        ..mesh.topology.node(NODE).agent_place()
    }
}

fn is_unknown(mesh: &Mesh, reason: &str) -> Result<()> {
    poll::until_true(&format!("nobody is taken for the kubelet: {reason}"), SOON, || {
        Ok(mesh.metric(NODE, "mesh_kubelet_unknown", &[("reason", reason)])? == 1.0)
    })
}

/// The declared port, by every form of the Pod's address.
fn passes(mesh: &Mesh, place: &Place) -> Result<()> {
    for address in mesh.pod("server").forms() {
        // The ports are told a moment after the manifest was written.
        poll::until_true(&format!("a probe of {address} is answered"), SOON, || {
            Ok(mesh
                .app
                .get(place, address, "/probe")
                .is_ok_and(|answer| answer.starts_with("server=server ")))
        })?;
    }
    Ok(())
}

fn is_refused(mesh: &Mesh, place: &Place, who: &str) -> Result<()> {
    for address in mesh.pod("server").forms() {
        if let Ok(answer) = mesh.app.get(place, address, "/imitated") {
            bail!("{who} was answered at {address}: {answer}");
        }
    }
    Ok(())
}

fn passed(mesh: &Mesh) -> Result<f64> {
    mesh.metric(NODE, "mesh_capture_events_total", &[("event", "passed_probe")])
}

fn declared(mesh: &mut Mesh) -> Result<()> {
    is_unknown(mesh, "no_process")?;
    let kubelet = Kubelet::start(mesh)?;
    Kubelet::is_known(mesh)?;
    passes(mesh, &kubelet.place)?;
    ensure!(passed(mesh)? >= 3.0, "probes passed, and were not counted");
    for address in mesh.pod("server").forms() {
        mesh.app
            .connect(&kubelet.place, address, ECHO_PORT)?
            .expect_refused(QUICKLY)?;
    }
    // The application sees the node, not the agent.
    let (v4, _) = NODE.addresses();
    let answer = mesh.app.get(&kubelet.place, mesh.pod("server").v4.into(), "/probe")?;
    ensure!(!answer.contains("client=127."), "{answer}, from {v4}");
    Ok(())
}

fn imitation(mesh: &mut Mesh) -> Result<()> {
    let kubelet = Kubelet::start(mesh)?;
    Kubelet::is_known(mesh)?;
    passes(mesh, &kubelet.place)?;
    let before = passed(mesh)?;
    let refused = |mesh: &Mesh| mesh.metric(NODE, "mesh_policy_denied_total", &[("policy", "_strict")]);
    let refused_before = refused(mesh)?;
    // Root of the node's: in another cgroup, and in one below the kubelet's.
    let elsewhere = mesh.topology.node(NODE).cgroup.child("elsewhere")?;
    is_refused(mesh, &place_in(mesh, elsewhere.path()), "a process in another cgroup")?;
    let below = kubelet.cgroup.child("below")?;
    is_refused(
        mesh,
        &place_in(mesh, below.path()),
        "a process in a cgroup below the kubelet's",
    )?;
    // In the kubelet's cgroup, from other network namespaces: the other node's, and the world's.
    for (netns, who) in [
        (mesh.topology.node(NodeName::One).netns.path(), "a process of the other node"),
        (mesh.topology.world().path(), "a process outside of the cluster"),
    ] {
        let place = Place {
            netns,
            ..kubelet.place.clone()
        };
        is_refused(mesh, &place, who)?;
    }
    ensure!(passed(mesh)? == before, "an imitation was counted as a probe");
    // Each of the four has come that far, by each of the three forms.
    poll::until_true(
        "12 refusals are counted",
        SOON,
        || Ok(refused(mesh)? >= refused_before + 12.0),
    )?;
    passes(mesh, &kubelet.place)
}

/// Who only bears the name is not taken for it: nobody's process, or one in another network namespace. Were one counted, the agent
/// would find two, and take nobody.
fn named_so(mesh: &mut Mesh) -> Result<()> {
    let node = mesh.topology.node(NODE);
    let cgroup = node.cgroup.child("impostor.service")?;
    let of_node = place_in(mesh, cgroup.path());
    let nobodys = Place {
        unprivileged: true,
        ..of_node.clone()
    };
    let elsewhere = Place {
        netns: mesh.topology.world().path(),
        ..of_node.clone()
    };
    let impostors = [
        called_kubelet(mesh, "nobodys", &nobodys, "10301")?,
        called_kubelet(mesh, "elsewhere", &elsewhere, "10302")?,
    ];
    let kubelet = Kubelet::start(mesh)?;
    Kubelet::is_known(mesh)?;
    passes(mesh, &kubelet.place)?;
    is_refused(mesh, &of_node, "one in the cgroup of processes that are called kubelet")?;
    drop((kubelet, impostors));
    is_unknown(mesh, "no_process")?;
    // The control: of two that could be it nobody is taken.
    let second = called_kubelet(mesh, "second", &of_node, "10303")?;
    Kubelet::is_known(mesh)?;
    drop(second);
    is_unknown(mesh, "no_process")?;
    let (second, kubelet) = (called_kubelet(mesh, "second", &of_node, "10303")?, Kubelet::start(mesh)?);
    is_unknown(mesh, "ambiguous")?;
    is_refused(mesh, &kubelet.place, "one of two that could be the kubelet")?;
    drop(second);
    Kubelet::is_known(mesh)?;
    passes(mesh, &kubelet.place)
}

fn without_agent(mesh: &mut Mesh) -> Result<()> {
    let kubelet = Kubelet::start(mesh)?;
    Kubelet::is_known(mesh)?;
    passes(mesh, &kubelet.place)?;
    mesh.kill_agent(NODE);
    passes(mesh, &kubelet.place)?;
    let elsewhere = mesh.topology.node(NODE).cgroup.child("elsewhere")?;
    is_refused(
        mesh,
        &place_in(mesh, elsewhere.path()),
        "a process in another cgroup, while no agent lives,",
    )?;
    mesh.launch_agent_with(NODE, &["--follow-pods"])?;
    mesh.wait_until_ready(NODE)?;
    Kubelet::is_known(mesh)?;
    passes(mesh, &kubelet.place)?;
    is_refused(mesh, &place_in(mesh, elsewhere.path()), "a process in another cgroup")
}

fn restarted(mesh: &mut Mesh) -> Result<()> {
    let kubelet = Kubelet::start(mesh)?;
    Kubelet::is_known(mesh)?;
    let first = known_id(mesh)?;
    drop(kubelet);
    is_unknown(mesh, "no_process")?;
    let again = Kubelet::start(mesh)?;
    Kubelet::is_known(mesh)?;
    ensure!(
        known_id(mesh)? != first,
        "the cgroup of the same name is another one, and the agent has the old one"
    );
    passes(mesh, &again.place)
}

fn shared(mesh: &mut Mesh) -> Result<()> {
    let kubelet = Kubelet::start(mesh)?;
    Kubelet::is_known(mesh)?;
    let place = Place {
        unprivileged: true,
        ..kubelet.place.clone()
    };
    let command = place.command(mesh.app.binary(), &["hold-serve", "10300"])?;
    let log = mesh.topology.node(NODE).folder.join("other.log");
    let other = Process::start("somebody in the kubelet's cgroup", command, log)?;
    is_unknown(mesh, "shared")?;
    is_refused(mesh, &kubelet.place, "one in a cgroup that others are in")?;
    drop(other);
    Kubelet::is_known(mesh)?;
    passes(mesh, &kubelet.place)
}

fn named(mesh: &mut Mesh) -> Result<()> {
    let cgroup = mesh.topology.node(NODE).cgroup.child("k3s.service")?;
    mesh.terminate_agent(NODE)?;
    mesh.launch_agent_with(NODE, &["--follow-pods", "--kubelet-cgroup", "/k3s.service"])?;
    mesh.wait_until_ready(NODE)?;
    Kubelet::is_known(mesh)?;
    passes(mesh, &place_in(mesh, cgroup.path()))?;
    drop(cgroup);
    is_unknown(mesh, "no_such_cgroup")?;
    mesh.terminate_agent(NODE)?;
    mesh.launch_agent_with(NODE, &["--follow-pods"])?;
    mesh.wait_until_ready(NODE)
}

fn undeclared(mesh: &mut Mesh) -> Result<()> {
    let kubelet = Kubelet::start(mesh)?;
    Kubelet::is_known(mesh)?;
    passes(mesh, &kubelet.place)?;
    declare(mesh, "livenessProbe: { httpGet: { port: 8080, host: 10.61.2.20 } }")?;
    let address = mesh.pod("server").v4.into();
    poll::until_true("the port is closed to probes", SOON, || {
        Ok(mesh.app.get(&kubelet.place, address, "/late").is_err())
    })?;
    is_refused(mesh, &kubelet.place, "the kubelet, at a port that is not declared,")?;
    let policy = mesh.registry.folder().join("deny.yaml");
    std::fs::metadata(policy).context("the policy that denies everybody")?;
    // And declared again it is open at once, without anything else.
    declare(mesh, &format!("livenessProbe: {{ tcpSocket: {{ port: {HTTP_PORT} }} }}"))?;
    passes(mesh, &kubelet.place)
}
