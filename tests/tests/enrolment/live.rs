//! Pods that ran before their namespace was labelled.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::app::ECHO_PORT;
use mesh_tests::cgroup::Cgroup;
use mesh_tests::load::Load;
use mesh_tests::mesh::Mesh;
use mesh_tests::netns::Netns;
use mesh_tests::poll::{self, SOON};
use mesh_tests::process::{Place, Process};
use mesh_tests::snapshot;
use mesh_tests::talk::Talk;
use mesh_tests::topology::NodeName;
use nix::sys::signal::Signal;
use serde_json::Value;

pub const NODE: NodeName = NodeName::Two;
/// A proof is made again every 5 s, and one that fails is tried for some; then the Pod is looked for, with pauses of up to 10 s.
const PATIENTLY: Duration = Duration::from_secs(60);

/// A Pod of node-2 that runs as the kubelet makes it run: in a cgroup that is named after it.
pub struct Running {
    name: &'static str,
    namespace: &'static str,
    server: Option<Process>,
    /// Innermost first: dropped in this order.
    cgroups: Vec<Cgroup>,
}

/// Unlike those of other suites, its uids are this run's own: agents look for them among all processes of the machine.
pub fn uid(name: &str) -> String {
    format!("uid-{name}-{}", std::process::id())
}

/// A Pod and its service account, with the addresses that it has so far.
pub fn write_pod(mesh: &Mesh, name: &str, namespace: &str, addresses: &[IpAddr], annotations: &str) -> Result<()> {
    let (uid, node) = (uid(name), NODE.as_str());
    let ips: Vec<String> = addresses.iter().map(|ip| format!("{{ ip: \"{ip}\" }}")).collect();
    mesh.registry.write(
        &format!("pod-{name}.yaml"),
        &format!(
            "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{ name: {name}, namespace: {namespace} }}\n\
             ---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: {namespace}\n  uid: {uid}\n\
             \x20 labels: {{ app: {name} }}\n  annotations: {{ {annotations} }}\n\
             spec: {{ nodeName: {node}, serviceAccountName: {name}, containers: [] }}\nstatus: {{ podIPs: [{}] }}\n",
            ips.join(", ")
        ),
    )
}

/// The names of the folders, as systemd's driver has them.
fn make_cgroups(mesh: &Mesh, name: &str) -> Result<Vec<Cgroup>> {
    let uid = uid(name).replace('-', "_");
    let mut cgroups: Vec<Cgroup> = Vec::new();
    for folder in [
        "kubepods.slice".to_owned(),
        "kubepods-burstable.slice".to_owned(),
        format!("kubepods-burstable-pod{uid}.slice"),
        "cri-containerd-c0ffee.scope".to_owned(),
    ] {
        let made = cgroups.first().unwrap_or(&mesh.pod(name).cgroup).child(&folder)?;
        cgroups.insert(0, made);
    }
    Ok(cgroups)
}

impl Running {
    pub fn start(mesh: &mut Mesh, name: &'static str, namespace: &'static str, host: u8) -> Result<Self> {
        mesh.topology.add_pod(name, NODE, host)?;
        let mut running = Self {
            name,
            namespace,
            server: None,
            cgroups: make_cgroups(mesh, name)?,
        };
        running.write(mesh, "")?;
        running.serve(mesh)?;
        Ok(running)
    }

    fn write(&self, mesh: &Mesh, annotations: &str) -> Result<()> {
        write_pod(mesh, self.name, self.namespace, &mesh.pod(self.name).addresses(), annotations)
    }

    fn place(&self, mesh: &Mesh) -> Place {
        Place {
            cgroup: self.cgroups.first().map(|cgroup| cgroup.path().to_owned()),
            ..mesh.pod(self.name).place()
        }
    }

    fn serve(&mut self, mesh: &Mesh) -> Result<()> {
        let log = mesh.topology.folder().join(format!("{}.log", self.name));
        self.server = Some(mesh.app.serve(self.name, &self.place(mesh), log)?);
        Ok(())
    }

    pub fn end(mut self, mesh: &mut Mesh) -> Result<()> {
        let is_enrolled = mesh.listed(self.name)?.is_some();
        let kept = || {
            mesh.metric(NODE, "mesh_following_failures_total", &[("reason", "still_running")])
                .unwrap_or(0.0)
        };
        let before = kept();
        mesh.registry.remove(&format!("pod-{}.yaml", self.name))?;
        if is_enrolled {
            // Its object is gone and its processes are not, as after a forced deletion: it stays captured.
            let is_listed = || Ok::<_, anyhow::Error>(mesh.listed(self.name)?.is_some());
            poll::until_true("its processes are seen", SOON, || Ok(kept() > before || !is_listed()?))?;
            ensure!(is_listed()?, "a Pod that runs was let go");
        }
        self.server.take();
        poll::until_true("the Pod that is gone is released", SOON, || {
            Ok(mesh.listed(self.name)?.is_none())
        })?;
        drop(self.cgroups);
        mesh.topology.remove_pod(self.name);
        Ok(())
    }
}

pub fn label(mesh: &Mesh, namespace: &str, value: &str) -> Result<()> {
    mesh.registry.write(
        &format!("namespace-{namespace}.yaml"),
        &format!("apiVersion: v1\nkind: Namespace\nmetadata: {{ name: {namespace}, labels: {{ culvert.dev/mesh: {value} }} }}\n"),
    )
}

pub fn wait_until_proven(mesh: &Mesh, name: &str) -> Result<Value> {
    poll::until(&format!("{name} is enrolled and proven"), SOON, || {
        Ok(mesh.listed(name)?.filter(|listed| listed["proven"] == true))
    })
}

fn unprotected(mesh: &Mesh, pod: &str) -> Result<f64> {
    mesh.metric(NODE, "mesh_pod_unprotected_connections", &[("pod", pod)])
}

/// What the agent says of a Pod that it does not enrol.
fn said(mesh: &Mesh, of: &str, pod: &str) -> Result<Option<String>> {
    let dump: Value = serde_json::from_str(&mesh.agent_page(NODE, 15000, "/config_dump")?.body)?;
    Ok(dump["following"][of][pod].as_str().map(str::to_owned))
}

pub fn joins_and_leaves(mesh: &mut Mesh) -> Result<()> {
    label(mesh, "late", "disabled")?;
    let walker = Running::start(mesh, "walker", "late", 41)?;
    // The kernel's own checks of its link-local address are over.
    let before = poll::until("its addresses are usable", SOON, || {
        let seen = snapshot::of(&mesh.pod("walker").netns)?;
        Ok(Some(seen).filter(|seen| !seen.contains("tentative")))
    })?;
    let outsider = mesh.pod("outsider").place();
    let mut inwards = mesh.app.chat(&outsider, mesh.pod("walker").v4.into())?;
    let mut outwards = mesh.app.chat(&walker.place(mesh), mesh.pod("outsider").v6.into())?;
    for chat in [&mut inwards, &mut outwards] {
        ensure!(chat.ask("before", SOON)? == "before");
    }
    ensure!(mesh.listed("walker")?.is_none(), "enrolled without a label");

    label(mesh, "late", "enabled")?;
    wait_until_proven(mesh, "walker")?;
    mesh.wait_for_tunnel("client", "walker")?;
    for chat in [&mut inwards, &mut outwards] {
        ensure!(
            chat.ask("enrolled", SOON)? == "enrolled",
            "an open connection did not survive the enrolment"
        );
    }
    ensure!(
        unprotected(mesh, "walker")? == 2.0,
        "both connections are open, and as unprotected as before"
    );
    drop(outwards);
    poll::until_true("a closed connection counts no longer", SOON, || {
        Ok(unprotected(mesh, "walker")? == 1.0)
    })?;

    // Without its control plane nothing is released; nor by an agent that has to find everything again.
    mesh.kill_control();
    mesh.kill_agent(NODE);
    mesh.launch_agent_with(NODE, &["--follow-pods"])?;
    mesh.wait_until_ready(NODE)?;
    wait_until_proven(mesh, "walker")?;
    mesh.start_control()?;
    mesh.wait_for_tunnel("client", "walker")?;
    ensure!(inwards.ask("restarted", SOON)? == "restarted");

    // The agent of now did not enrol it, and knows all the same that it may release it.
    let loads = [Load::start(mesh, "client", "walker")?, Load::start(mesh, "walker", "client")?];
    label(mesh, "late", "disabled")?;
    poll::until_true("the Pod is released", SOON, || Ok(mesh.listed("walker")?.is_none()))?;
    for load in loads {
        load.wait_for(100)?;
        let (made, failures) = load.finish()?;
        ensure!(
            failures.is_empty(),
            "while the Pod left, connections failed; {made} worked: {failures:?}"
        );
    }
    ensure!(
        inwards.ask("released", SOON)? == "released",
        "an open connection did not survive the release"
    );
    let after = snapshot::of(&mesh.pod("walker").netns)?;
    ensure!(
        before == after,
        "the release left something:\nbefore\n{before}\nafter\n{after}"
    );
    mesh.wait_for_outcome("outsider", mesh.pod("walker").v6.into(), ECHO_PORT, true)?;
    ensure!(
        mesh.metric(NodeName::One, "mesh_pod_protected", &[("pod", "client")])? == 1.0,
        "one enrolled by hand was touched"
    );
    drop(inwards);
    walker.end(mesh)
}

/// SIGTERM without a successor, and the label goes while the agent drains: a connection that is open ends at both Pods before anything of
/// it finds another way.
pub fn leaves_an_agent_that_ends(mesh: &mut Mesh) -> Result<()> {
    label(mesh, "ending", "enabled")?;
    let runner = Running::start(mesh, "runner", "ending", 48)?;
    mesh.terminate_agent(NODE)?;
    mesh.launch_agent_with(NODE, &["--follow-pods", "--drain-seconds", "60"])?;
    mesh.wait_until_ready(NODE)?;
    wait_until_proven(mesh, "runner")?;
    mesh.wait_for_tunnel("client", "runner")?;
    let talk = Talk::begin(mesh, "client", "runner")?;
    let ending = mesh.take_agent(NODE)?;
    ending.signal(Signal::SIGTERM)?;
    label(mesh, "ending", "disabled")?;
    talk.end("the Pod left an agent that ends")?;
    ending.wait(PATIENTLY)?;
    mesh.launch_agent_with(NODE, &["--follow-pods"])?;
    mesh.wait_until_ready(NODE)?;
    ensure!(mesh.listed("runner")?.is_none(), "it was not released");
    runner.end(mesh)
}

/// It counts as protected no longer, and once it can be completed it is, though the Pod is a member again by then.
pub fn release_fails(mesh: &mut Mesh) -> Result<()> {
    label(mesh, "stumble", "enabled")?;
    let stumbler = Running::start(mesh, "stumbler", "stumble", 47)?;
    wait_until_proven(mesh, "stumbler")?;
    mesh.wait_for_tunnel("client", "stumbler")?;
    // Where the new form of its record would be written.
    let in_the_way = mesh
        .topology
        .node(NODE)
        .run_dir()
        .join(format!("pods/{}.json.new", uid("stumbler")));
    std::fs::create_dir(&in_the_way)?;
    label(mesh, "stumble", "disabled")?;
    let why = poll::until("the agent says why the Pod is not released", SOON, || {
        said(mesh, "failing", "stumble/stumbler")
    })?;
    ensure!(why.contains("writing an enrolment's record"), "{why}");
    let is_proven = || {
        let listed = mesh.listed("stumbler")?.context("it was released")?;
        Ok::<_, anyhow::Error>(listed["proven"] == true)
    };
    ensure!(!is_proven()?, "it counts as protected");
    label(mesh, "stumble", "enabled")?;
    let failures = || mesh.metric(NODE, "mesh_following_failures_total", &[]);
    let before = failures()?;
    poll::until_true("it is tried again", SOON, || Ok(failures()? > before))?;
    ensure!(!is_proven()?, "it counts as protected, and its release has not ended");
    std::fs::remove_dir(&in_the_way)?;
    poll::until_true("it is released, and enrolled anew", PATIENTLY, || {
        Ok(mesh.listed("stumbler")?.is_some_and(|listed| listed["proven"] == true))
    })?;
    mesh.wait_for_tunnel("client", "stumbler")?;
    stumbler.end(mesh)
}

/// What a process is in decides, not what its cgroup is called: of another Pod's namespace nothing is taken.
pub fn wrong_pairing(mesh: &mut Mesh) -> Result<()> {
    label(mesh, "pair", "enabled")?;
    let mut bystander = Running::start(mesh, "bystander", "outside", 42)?;
    mesh.topology.add_pod("claimant", NODE, 43)?;
    let mut claimant = Running {
        name: "claimant",
        namespace: "pair",
        server: None,
        cgroups: make_cgroups(mesh, "claimant")?,
    };
    // In the cgroup of the one, and in the namespace of the other.
    let mixed = Place {
        netns: mesh.pod("bystander").netns.path(),
        ..claimant.place(mesh)
    };
    bystander.server.take();
    let log = mesh.topology.folder().join("mixed.log");
    let impostor = mesh.app.serve("impostor", &mixed, log)?;
    claimant.write(mesh, "")?;
    let why = poll::until("the agent says why the Pod is not enrolled", SOON, || {
        said(mesh, "failing", "pair/claimant")
    })?;
    ensure!(why.contains("address"), "expected that the addresses differ, saw {why}");
    ensure!(mesh.listed("claimant")?.is_none() && mesh.listed("bystander")?.is_none());
    let failures = mesh.metric(NODE, "mesh_following_failures_total", &[("reason", "no_address")])?;
    ensure!(failures > 0.0, "the failure is not counted");

    // Its own process shows its own namespace, whatever else there is.
    claimant.serve(mesh)?;
    wait_until_proven(mesh, "claimant")?;
    mesh.wait_for_tunnel("client", "claimant")?;
    let after = snapshot::of(&mesh.pod("bystander").netns)?;
    ensure!(!after.contains(":15001"), "the bystander was captured:\n{after}");
    drop(impostor);
    claimant.end(mesh)?;
    bystander.end(mesh)
}

/// Whoever runs in a Pod can make another network namespace and give it the Pod's address.
pub fn decoy(mesh: &mut Mesh) -> Result<()> {
    let deceiver = Running::start(mesh, "deceiver", "decoy", 46)?;
    let [v4, v6] = mesh.pod("deceiver").addresses();
    let elsewhere = Netns::create(format!("{}d", mesh.pod("deceiver").netns.name()))?;
    elsewhere.batch(&[format!("addr add {v4}/32 dev lo"), format!("addr add {v6}/128 dev lo nodad")])?;
    let place = Place {
        netns: elsewhere.path(),
        ..deceiver.place(mesh)
    };
    let log = mesh.topology.folder().join("decoy.log");
    let in_decoy = mesh.app.serve("decoy", &place, log)?;
    // Both have its address: the one with the way out counts.
    label(mesh, "decoy", "enabled")?;
    let enrolled = wait_until_proven(mesh, "deceiver")?;
    mesh.wait_for_tunnel("client", "deceiver")?;

    // Now it is the decoy's alone, and the Pod cannot be proven any longer.
    let of_pod = &mesh.pod("deceiver").netns;
    of_pod.batch(&[format!("addr del {v4}/32 dev eth0"), format!("addr del {v6}/128 dev eth0")])?;
    let is_the_same = || {
        let listed = mesh.listed("deceiver")?;
        Ok::<_, anyhow::Error>(listed.is_some_and(|listed| listed["netns_cookie"] == enrolled["netns_cookie"]))
    };
    poll::until_true("the agent has found the decoy", PATIENTLY, || {
        let said = said(mesh, "failing", "decoy/deceiver")?;
        Ok(said.is_some_and(|why| why.contains("another network namespace")) || !is_the_same()?)
    })?;
    ensure!(is_the_same()?, "the Pod's own namespace was let go for a decoy");
    ensure!(!snapshot::of(&elsewhere)?.contains(":15001"), "the decoy was captured");
    ensure!(
        snapshot::of(of_pod)?.contains(":15001"),
        "the Pod's own namespace is captured no longer"
    );
    drop(in_decoy);
    deceiver.end(mesh)
}

pub fn refused(mesh: &mut Mesh) -> Result<()> {
    label(mesh, "mixed", "enabled")?;
    label(mesh, "kube-system", "enabled")?;
    let sidecar = Running::start(mesh, "injected", "mixed", 44)?;
    sidecar.write(mesh, "sidecar.istio.io/status: injected")?;
    let dns = Running::start(mesh, "dns", "kube-system", 45)?;
    let why = poll::until("the refused Pod is named by its agent", SOON, || {
        said(mesh, "refused", "mixed/injected")
    })?;
    ensure!(why.contains("sidecar"), "{why}");
    poll::until_true("the control plane says what it ignores", SOON, || {
        let status: Value = serde_json::from_str(&mesh.control_page("/status")?.body)?;
        let warnings = status["warnings"].as_array().context("warnings")?;
        let says = |what: &str| {
            warnings
                .iter()
                .any(|warning| warning.as_str().is_some_and(|text| text.contains(what)))
        };
        Ok(says("kube-system") && says("mixed/injected"))
    })?;
    poll::until_true("the refused Pod is released, and the other was never enrolled", SOON, || {
        Ok(mesh.listed("injected")?.is_none() && mesh.listed("dns")?.is_none())
    })?;
    label(mesh, "kube-system", "disabled")?;
    sidecar.end(mesh)?;
    dns.end(mesh)
}
