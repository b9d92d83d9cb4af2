//! Agents and the control plane that die and come back, and leaving no trace.

use std::fs::Permissions;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::access_log::Position;
use mesh_tests::app::{ECHO_PORT, HTTP_PORT};
use mesh_tests::binaries;
use mesh_tests::demo::PODS;
use mesh_tests::manifests::{MESHED, policy};
use mesh_tests::memory_limit::MemoryLimit;
use mesh_tests::mesh::{Mesh, PodSpec};
use mesh_tests::poll::{self, SOON};
use mesh_tests::process::{Output, Place, Process, tail};
use mesh_tests::snapshot;
use mesh_tests::suite;
use mesh_tests::topology::NodeName;
use mesh_tests::wire::Recorder;
use nix::sys::signal::{Signal, kill};

const QUICKLY: Duration = Duration::from_secs(1);
/// Where the agent first waits for something better: 5 s for discovery, or two proofs 5 s apart.
const PATIENTLY: Duration = Duration::from_secs(40);

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
            ("an_agent_that_runs_out_of_memory_refuses_until_it_is_back", out_of_memory),
            ("an_agent_that_knows_nothing_yet_is_not_ready", not_ready),
            ("an_agent_that_is_stopped_comes_back", agent_stopped),
            ("a_hung_agent_refuses", agent_hung),
            ("a_hung_destination_agent_refuses", destination_agent_hung),
            ("a_pod_that_cannot_be_proven_stays_pending", never_proven),
            ("what_is_open_in_clear_ends_when_its_pod_is_proven", proven_while_open),
            ("a_pod_whose_proof_is_lost_gets_nothing", lost),
            ("the_local_socket_is_roots_alone", local_socket),
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
    for address in mesh.pod("server").forms() {
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

/// Requests of the client that carry a marker, one after the other without a pause, and the wire between the nodes: whatever
/// happens meanwhile, the marker must not be seen in clear.
struct Insistence {
    marker: String,
    recorder: Recorder,
    requests: Process,
    log: PathBuf,
}

impl Insistence {
    fn start(mesh: &Mesh, to: IpAddr) -> Result<Self> {
        let marker = format!("marker-{:032x}", rand::random::<u128>());
        let log = mesh.topology.folder().join(format!("{marker}.log"));
        let recorder = Recorder::start(&mesh.topology.node(NodeName::One).netns, "uplink")?;
        let url = format!("http://{}/{marker}", SocketAddr::new(to, HTTP_PORT));
        let script = format!("while :; do {} get {url} 2>&1; done", mesh.app.binary().display());
        let command = mesh.pod("client").place().command("/bin/sh".as_ref(), &["-c", &script])?;
        let requests = Process::start("the client's requests", command, log.clone())?;
        Ok(Self {
            marker,
            recorder,
            requests,
            log,
        })
    }

    /// Some were refused, some answered (after `mesh` works again), and none was sent in clear.
    fn finish(self) -> Result<()> {
        let answers = || {
            std::fs::read_to_string(&self.log)
                .unwrap_or_default()
                .matches(&self.marker)
                .count()
        };
        let before = answers();
        poll::until_true("the client's requests are answered again", SOON, || Ok(answers() > before))?;
        drop(self.requests);
        let said = std::fs::read_to_string(&self.log)?;
        ensure!(
            said.contains("refused") || said.contains("reset"),
            "expected that some requests are refused, saw {}",
            tail(&self.log, 10)
        );
        let recording = self.recorder.finish()?;
        ensure!(
            recording.frames > 0,
            "nothing passed between the nodes: the recording proves nothing"
        );
        ensure!(
            !recording.contains(self.marker.as_bytes()),
            "a request of the client passed between the nodes in clear"
        );
        Ok(())
    }
}

/// Kills the agent of a node, checks that connections to these are refused, starts it, and checks that they work; and that
/// none of them went in clear at any time.
fn kill_and_restart(mesh: &mut Mesh, node: NodeName, to: &[&str]) -> Result<()> {
    let before = mesh.access_log(NodeName::One).position();
    mesh.kill_agent(node);
    // Both families go through the same code; "server" is on the other node, so that the wire shows something.
    let insistence = Insistence::start(mesh, mesh.pod("server").v4.into())?;
    for server in to {
        for address in mesh.pod(server).forms() {
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
    insistence.finish()?;
    expect_no_passthrough(mesh, before)
}

/// Of the client's node.
fn expect_no_passthrough(mesh: &Mesh, since: Position) -> Result<()> {
    let fields = [("direction", "outbound"), ("path", "passthrough"), ("result", "ok")];
    let in_clear = mesh.access_log(NodeName::One).since(since, &fields);
    ensure!(in_clear.is_empty(), "expected tunnels only, saw {in_clear:?}");
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

/// Killed by the kernel while it serves: what happens to the connections that it is about to take is the kernel's to see to.
fn out_of_memory(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    let before = mesh.access_log(NodeName::One).position();
    let insistence = Insistence::start(mesh, mesh.pod("server").v4.into())?;
    let limit = MemoryLimit::create(mesh.topology.folder(), mesh.topology.node(NodeName::One).cgroup.path())?;
    let id = mesh.agent_id(NodeName::One).context("the agent runs")?;
    limit.adopt(id, 1 << 20)?;
    let client = mesh.pod("client").place();
    let server = mesh.pod("server").v6;
    poll::until_true("the kernel has no memory for the agent", PATIENTLY, || {
        mesh.app.swarm(&client, server.into(), 100)?;
        Ok(limit.kills()? > 0)
    })?;
    let agent = mesh.take_agent(NodeName::One)?;
    let status = agent.wait(SOON).context("the agent ends")?;
    ensure!(
        status.signal() == Some(libc::SIGKILL),
        "expected that the kernel kills it, saw {status}"
    );
    drop(limit);
    for address in mesh.pod("server").forms() {
        mesh.app.connect(&client, address, ECHO_PORT)?.expect_refused(QUICKLY)?;
    }
    mesh.start_agent(NodeName::One)?;
    mesh.wait_for_tunnel("client", "server")?;
    insistence.finish()?;
    expect_no_passthrough(mesh, before)
}

fn not_ready(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    let server: IpAddr = mesh.pod("server").v4.into();
    mesh.kill_control();
    mesh.kill_agent(NodeName::One);
    // What an agent remembers of the one before is survival.rs's.
    std::fs::remove_file(mesh.topology.node(NodeName::One).run_dir().join("memory"))?;
    let insistence = Insistence::start(mesh, server)?;
    mesh.launch_agent(NodeName::One)?;
    let reason = poll::until("the agent says what it waits for", SOON, || {
        let page = mesh.agent_page(NodeName::One, 15021, "/healthz/ready")?;
        Ok((page.status == 503).then_some(page.body))
    })?;
    ensure!(
        reason.contains("discovery") && reason.contains(":15012"),
        "expected the control plane that is missing, saw {reason}"
    );
    // It serves its Pods, and knows of no destination whether it is in the mesh: closed, never guessed.
    for address in mesh.pod("server").forms() {
        let attempt = mesh.app.connect(&mesh.pod("client").place(), address, ECHO_PORT)?;
        attempt.expect_refused(PATIENTLY)?;
    }
    let page = mesh.agent_page(NodeName::One, 15021, "/healthz/ready")?;
    ensure!(page.status == 503, "without its control plane it became ready: {page:?}");
    mesh.start_control()?;
    mesh.wait_until_ready(NodeName::One)?;
    mesh.wait_for_tunnel("client", "server")?;
    insistence.finish()
}

fn agent_stopped(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    mesh.terminate_agent(NodeName::One)?;
    for address in mesh.pod("server").forms() {
        mesh.app
            .connect(&mesh.pod("client").place(), address, ECHO_PORT)?
            .expect_refused(QUICKLY)?;
    }
    mesh.start_agent(NodeName::One)?;
    mesh.wait_for_tunnel("client", "server")
}

fn agent_hung(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    let id = mesh.agent_id(NodeName::One).context("the agent runs")?;
    let process = nix::unistd::Pid::from_raw(i32::try_from(id)?);
    kill(process, Signal::SIGSTOP)?;
    // Its listeners still accept in the kernel; the heartbeat's lease (5 s) is what tells. Until then connections hang.
    std::thread::sleep(Duration::from_secs(6));
    let forms = mesh.pod("server").forms();
    let attempts = forms.map(|address| mesh.app.connect(&mesh.pod("client").place(), address, ECHO_PORT));
    kill(process, Signal::SIGCONT)?;
    for attempt in attempts {
        attempt?.expect_refused(QUICKLY)?;
    }
    for address in forms {
        mesh.wait_for_outcome("client", address, ECHO_PORT, true)?;
    }
    Ok(())
}

/// A tunnel that was open is given up only when its pings are not answered; a client's agent that has none sees what every new
/// connection sees.
fn destination_agent_hung(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    let before = mesh.access_log(NodeName::One).position();
    let agent = mesh.take_agent(NodeName::Two)?;
    agent.signal(Signal::SIGSTOP)?;
    mesh.kill_agent(NodeName::One);
    let insistence = Insistence::start(mesh, mesh.pod("server").v4.into())?;
    mesh.start_agent(NodeName::One)?;
    // From the last beat: its lease; and then the end of what it had accepted before, for which the client's agent waits.
    std::thread::sleep(Duration::from_secs(6));
    let refused = || {
        poll::until_true("nothing waits for a handshake with the hung agent", PATIENTLY, || {
            let server = mesh.pod("server").v4.into();
            let attempt = mesh.app.connect(&mesh.pod("client").place(), server, ECHO_PORT)?;
            Ok(attempt.expect_refused(QUICKLY).is_ok())
        })?;
        for from in ["client", "outsider"] {
            for address in mesh.pod("server").forms() {
                let attempt = mesh.app.connect(&mesh.pod(from).place(), address, ECHO_PORT)?;
                attempt
                    .expect_refused(QUICKLY)
                    .with_context(|| format!("{from} → {address}"))?;
            }
        }
        Ok(())
    };
    let refused: Result<()> = refused();
    agent.signal(Signal::SIGCONT)?;
    mesh.put_agent(NodeName::Two, agent);
    refused?;
    mesh.wait_for_tunnel("client", "server")?;
    insistence.finish()?;
    expect_no_passthrough(mesh, before)?;
    mesh.wait_for_outcome("outsider", mesh.pod("server").v4.into(), ECHO_PORT, true)
}

/// A new Pod of node-2 with its server and manifest, not enrolled.
fn add_stray(mesh: &mut Mesh, name: &'static str, host: u8) -> Result<()> {
    let pod = PodSpec {
        name,
        node: NodeName::Two,
        host,
        meshed: true,
        annotations: "",
    };
    mesh.topology.add_pod(pod.name, pod.node, pod.host)?;
    mesh.write_pod(&pod)?;
    mesh.start_server(name)
}

fn remove_stray(mesh: &mut Mesh, name: &str) -> Result<()> {
    mesh.release(name)?;
    mesh.registry.remove(&format!("pod-{name}.yaml"))?;
    mesh.stop_server(name);
    mesh.topology.remove_pod(name);
    Ok(())
}

/// What is said of a Pod: by its agent's list and metric, and by the control plane.
fn expect_standing(mesh: &Mesh, name: &str, state: &str) -> Result<()> {
    poll::until_true(&format!("{name} is {state} for the control plane"), PATIENTLY, || {
        Ok(mesh.capture_state(name)? == state)
    })?;
    let proven = state == "proven";
    let listed = mesh
        .listed(name)?
        .with_context(|| format!("the agent does not list {name}"))?;
    let has_reason = listed["reason"].as_str().is_some_and(|reason| !reason.is_empty());
    ensure!(
        listed["proven"] == proven && has_reason != proven,
        "expected {name} as {state}, saw {listed}"
    );
    let labels = [("namespace", MESHED), ("pod", name)];
    let protected = mesh.metric(NodeName::Two, "mesh_pod_protected", &labels)?;
    ensure!(
        (protected == 1.0) == proven,
        "{name} is {state}, and mesh_pod_protected is {protected}"
    );
    Ok(())
}

/// Its probe runs in a cgroup that the node's programs are not attached to, as the applications of a Pod whose cgroup lies
/// outside of the agent's root would.
fn never_proven(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    add_stray(mesh, "stray", 31)?;
    let elsewhere = mesh.topology.node(NodeName::One).cgroup.path().to_owned();
    let error = match mesh.enroll_in("stray", &elsewhere) {
        Ok(()) => bail!("a Pod outside the agent's cgroup root was enrolled as proven"),
        Err(error) => format!("{error:#}"),
    };
    ensure!(error.contains("not in the mesh yet"), "expected why it is not, saw {error}");
    expect_standing(mesh, "stray", "pending")?;
    // Never proven, so never promised: it is reached as before.
    for address in mesh.pod("stray").forms() {
        let log = mesh.access_log(NodeName::One);
        let position = log.position();
        mesh.wait_for_outcome("client", address, ECHO_PORT, true)?;
        let destination = SocketAddr::new(address.to_canonical(), ECHO_PORT).to_string();
        let fields = [
            ("path", "passthrough"),
            ("result", "ok"),
            ("destination_address", destination.as_str()),
        ];
        log.wait_for(position, &fields, SOON)?;
    }
    mesh.release("stray")?;
    mesh.enroll("stray")?;
    expect_standing(mesh, "stray", "proven")?;
    mesh.wait_for_tunnel("client", "stray")?;
    remove_stray(mesh, "stray")
}

/// A Pod proven once gets nothing in clear from the mesh, not on connections of before either; those of others go on.
fn proven_while_open(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    add_stray(mesh, "late", 33)?;
    let (late, server): (IpAddr, IpAddr) = (mesh.pod("late").v4.into(), mesh.pod("server").v4.into());
    mesh.wait_for_path("client", late, "passthrough")?;
    let mut in_clear = mesh.app.chat(&mesh.pod("client").place(), late)?;
    let mut tunnelled = mesh.app.chat(&mesh.pod("client").place(), server)?;
    ensure!(in_clear.ask("in clear", SOON)? == "in clear");
    ensure!(tunnelled.ask("before", SOON)? == "before");
    let log = mesh.access_log(NodeName::One);
    let position = log.position();
    mesh.enroll("late")?;
    let end = in_clear.hear(PATIENTLY).context("a proven Pod still gets cleartext")?;
    ensure!(end.contains("error"), "expected a reset, saw {end}");
    let destination = SocketAddr::new(late, ECHO_PORT).to_string();
    let fields = [
        ("path", "passthrough"),
        ("reason", "cut_by_protection"),
        ("destination_address", destination.as_str()),
    ];
    log.wait_for(position, &fields, SOON)?;
    let counted = mesh.metric(
        NodeName::One,
        "mesh_policy_cut_total",
        &[("policy", "_destination_protected")],
    )?;
    ensure!(counted >= 1.0, "expected the cut to be counted, saw {counted}");
    ensure!(tunnelled.ask("after", SOON)? == "after", "another connection was cut as well");
    mesh.wait_for_tunnel("client", "late")?;
    remove_stray(mesh, "late")
}

/// Proven, then no longer provable: the cgroup that it is proven in is gone, which the agent cannot repair. Peers must not
/// fall back to cleartext.
fn lost(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    add_stray(mesh, "frail", 32)?;
    let cgroup = mesh.pod("frail").cgroup.path().join("probed");
    std::fs::create_dir(&cgroup)?;
    mesh.enroll_in("frail", &cgroup)?;
    expect_standing(mesh, "frail", "proven")?;
    mesh.wait_for_tunnel("client", "frail")?;
    poll::until_true("the cgroup is empty", SOON, || Ok(std::fs::remove_dir(&cgroup).is_ok()))?;
    expect_standing(mesh, "frail", "lost")?;
    for address in mesh.pod("frail").forms() {
        let log = mesh.access_log(NodeName::One);
        poll::until_true("the client's node knows", SOON, || {
            let position = log.position();
            let attempt = mesh.app.connect(&mesh.pod("client").place(), address, ECHO_PORT)?;
            let refused = [("direction", "outbound"), ("reason", "destination_lost")];
            Ok(attempt.expect_refused(PATIENTLY).is_ok() && log.wait_for(position, &refused, Duration::from_secs(1)).is_ok())
        })
        .with_context(|| format!("client → {address}"))?;
    }
    std::fs::create_dir(&cgroup)?;
    expect_standing(mesh, "frail", "proven")?;
    mesh.wait_for_tunnel("client", "frail")?;
    remove_stray(mesh, "frail")
}

/// With its folder and file opened to all by mistake, SO_PEERCRED still tells who asks.
fn local_socket(shared: &mut Shared) -> Result<()> {
    let mesh = &mut shared.mesh;
    let node = mesh.topology.node(NodeName::Two);
    let binary = mesh.topology.folder().join("mesh-agent");
    std::fs::copy(binaries::path("mesh-agent")?, &binary)?;
    let nobody = Place {
        netns: node.netns.path(),
        cgroup: None,
        unprivileged: true,
    };
    let run_dir = node.run_dir();
    let list = || -> Result<Output> {
        let folder = run_dir.to_str().context("a path")?;
        nobody.run(&binary, &["list", "--run-dir", folder], PATIENTLY)
    };
    let refused = || mesh.metric(NodeName::Two, "mesh_local_refused_total", &[]);
    ensure!(!list()?.status.success(), "nobody may look into --run-dir");
    ensure!(
        refused()? == 0.0,
        "what never reached the socket was counted as refused there"
    );
    let set_mode = |path: &Path, mode| std::fs::set_permissions(path, Permissions::from_mode(mode));
    let socket = run_dir.join("agent.sock");
    set_mode(&run_dir, 0o711)?;
    set_mode(&socket, 0o666)?;
    // By a client that connects once; `list` may try again by itself.
    let is_closed = mesh.app.is_closed_by(&nobody, &socket)?;
    let counted = refused()?;
    let output = list()?;
    set_mode(&run_dir, 0o700)?;
    set_mode(&socket, 0o600)?;
    ensure!(
        !output.status.success() && output.stdout.is_empty(),
        "expected that nobody is refused, saw {output:?}"
    );
    ensure!(is_closed, "expected that nobody's connection is closed without a byte");
    ensure!(counted == 1.0, "expected mesh_local_refused_total 1, saw {counted}");
    ensure!(mesh.listed("server")?.is_some(), "root is refused as well");
    Ok(())
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
    let error = mesh
        .cleanup(NodeName::Two)
        .err()
        .context("cleaned up under the hands of a running agent")?;
    ensure!(format!("{error:#}").contains("end the agent first"), "{error:#}");
    mesh.wait_for_tunnel("client", "server")?;
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
