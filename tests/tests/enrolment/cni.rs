//! The CNI plugin, run as a container runtime runs it.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::binaries;
use mesh_tests::mesh::Mesh;
use mesh_tests::poll::{self, SOON};
use serde_json::{Value, json};

use super::live::{NODE, Running, label, uid, wait_until_proven, write_pod};

/// What the plugin said.
#[derive(Debug)]
struct Said {
    succeeded: bool,
    result: Value,
    remark: String,
}

impl Said {
    /// # Errors
    /// It failed.
    fn ok(&self) -> Result<&Self> {
        ensure!(self.succeeded, "expected success, saw {self:?}");
        Ok(self)
    }

    /// # Errors
    /// It did not fail just so.
    fn refused(&self, code: u64, word: &str) -> Result<()> {
        let message = self.result["msg"].as_str().unwrap_or_default();
        ensure!(
            !self.succeeded && self.result["code"] == code && message.contains(word),
            "expected code {code} with {word:?}, saw {self:?}"
        );
        Ok(())
    }
}

/// A sandbox as the runtime has made it, and the Pod that it says it is of.
struct Sandbox<'a> {
    of: &'a str,
    namespace: &'a str,
    netns: PathBuf,
    addresses: [String; 2],
}

impl<'a> Sandbox<'a> {
    fn of(mesh: &Mesh, name: &'a str, namespace: &'a str) -> Self {
        Self {
            of: name,
            namespace,
            netns: mesh.pod(name).netns.path(),
            addresses: mesh.pod(name).addresses().map(|address| address.to_string()),
        }
    }

    fn run(&self, mesh: &Mesh, command: &str) -> Result<Said> {
        let node = mesh.topology.node(NODE);
        let ips: Vec<Value> = (self.addresses.iter())
            .map(|address| json!({"address": format!("{address}/32")}))
            .collect();
        let configuration = json!({
            "cniVersion": "1.0.0", "name": "testbed", "type": "mesh-cni", "runDir": node.run_dir(),
            "prevResult": {"cniVersion": "1.0.0", "ips": ips, "dns": {}},
        });
        let mut plugin = node.agent_place().command(&binaries::path("mesh-cni")?, &[])?;
        let arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID=c0ffee;K8S_POD_UID={}",
            self.namespace,
            self.of,
            uid(self.of)
        );
        plugin
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", "c0ffee")
            .env("CNI_NETNS", &self.netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", "/opt/cni/bin")
            .env("CNI_ARGS", arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // Ends by itself: all that it waits for is bounded.
        let mut running = plugin.spawn().context("starting mesh-cni")?;
        let mut input = running.stdin.take().context("stdin")?;
        input.write_all(configuration.to_string().as_bytes())?;
        drop(input);
        let output = running.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(Said {
            succeeded: output.status.success(),
            result: if text.trim().is_empty() {
                Value::Null
            } else {
                serde_json::from_str(&text).with_context(|| format!("what mesh-cni said: {text}"))?
            },
            remark: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }
}

/// As the API server knows a Pod whose sandbox is only made: without an address.
fn write_scheduled(mesh: &Mesh, name: &str, namespace: &str) -> Result<()> {
    write_pod(mesh, name, namespace, &[], "")
}

fn wait_for_list(mesh: &Mesh, namespace: &str) -> Result<()> {
    let path = mesh.topology.node(NODE).run_dir().join("cni-namespaces.json");
    poll::until_true(&format!("the plugin's list has {namespace}"), SOON, || {
        Ok(std::fs::read_to_string(&path).is_ok_and(|text| text.contains(namespace)))
    })
}

pub fn add_check_del(mesh: &mut Mesh) -> Result<()> {
    label(mesh, "early", "enabled")?;
    wait_for_list(mesh, "early")?;
    mesh.topology.add_pod("first", NODE, 51)?;
    write_scheduled(mesh, "first", "early")?;
    let sandbox = Sandbox::of(mesh, "first", "early");
    let said = sandbox.run(mesh, "ADD")?;
    said.ok()?;
    ensure!(
        said.result["ips"][1]["address"] == format!("{}/32", mesh.pod("first").v6),
        "what the plugins before have made is not handed on: {said:?}"
    );
    // Not a moment later: no process of the Pod has run yet.
    let listed = mesh.listed("first")?.context("enrolled")?;
    ensure!(listed["proven"] == true, "ADD has not waited for the proof: {listed}");
    sandbox.run(mesh, "CHECK")?.ok()?;
    mesh.start_server("first")?;
    write_pod(mesh, "first", "early", &mesh.pod("first").addresses(), "")?;
    mesh.wait_for_tunnel("client", "first")?;

    // A runtime may come back with an earlier sandbox of the Pod: that is not this one.
    let earlier = Sandbox {
        netns: "/run/netns/culvert-no-such-namespace".into(),
        ..Sandbox::of(mesh, "first", "early")
    };
    earlier.run(mesh, "DEL")?.ok()?;
    ensure!(mesh.listed("first")?.is_some(), "the DEL of another sandbox released the Pod");
    mesh.stop_server("first");
    for _ in 0..2 {
        sandbox.run(mesh, "DEL")?.ok()?;
        ensure!(mesh.listed("first")?.is_none(), "DEL did not release");
    }
    sandbox.run(mesh, "CHECK")?.refused(100, "not enrolled")?;
    mesh.registry.remove("pod-first.yaml")?;
    mesh.topology.remove_pod("first");
    Ok(())
}

pub fn without_agent(mesh: &mut Mesh) -> Result<()> {
    label(mesh, "early", "enabled")?;
    mesh.registry.write(
        "namespace-soft.yaml",
        "apiVersion: v1\nkind: Namespace\nmetadata: { name: soft, labels: { culvert.dev/mesh: enabled, culvert.dev/enrolment: best-effort } }\n",
    )?;
    wait_for_list(mesh, "early")?;
    wait_for_list(mesh, "soft")?;
    mesh.topology.add_pod("orphan", NODE, 52)?;
    write_scheduled(mesh, "orphan", "early")?;
    mesh.kill_agent(NODE);
    let orphan = Sandbox::of(mesh, "orphan", "early");
    orphan.run(mesh, "ADD")?.refused(11, "does not answer")?;
    for (namespace, word) in [
        ("soft", "as its namespace asks"),
        ("kube-system", "not in the mesh"),
        ("legacy", "not in the mesh"),
    ] {
        let other = Sandbox::of(mesh, "orphan", namespace);
        let said = other.run(mesh, "ADD")?;
        ensure!(said.ok()?.remark.contains(word), "{namespace}: {said:?}");
    }
    orphan.run(mesh, "DEL")?.ok()?;
    mesh.launch_agent_with(NODE, &["--follow-pods"])?;
    mesh.wait_until_ready(NODE)?;
    orphan.run(mesh, "ADD")?.ok().context("with an agent again")?;
    ensure!(mesh.listed("orphan")?.is_some_and(|listed| listed["proven"] == true));
    // Its Pod object goes, and no DEL comes.
    mesh.registry.remove("pod-orphan.yaml")?;
    poll::until_true("a Pod that the list has no longer is released", SOON, || {
        Ok(mesh.listed("orphan")?.is_none())
    })?;
    mesh.topology.remove_pod("orphan");
    Ok(())
}

/// Captured as any other, but nobody would believe it: its service account is deleted.
pub fn without_certificate(mesh: &mut Mesh) -> Result<()> {
    label(mesh, "early", "enabled")?;
    wait_for_list(mesh, "early")?;
    mesh.topology.add_pod("unsigned", NODE, 56)?;
    write_scheduled(mesh, "unsigned", "early")?;
    poll::until_true("the control plane knows the Pod and its account", SOON, || {
        let status: Value = serde_json::from_str(&mesh.control_page("/status")?.body)?;
        Ok(status["pods"]["early/unsigned"].is_string())
    })?;
    let manifest = std::fs::read_to_string(mesh.registry.folder().join("pod-unsigned.yaml"))?;
    let (account, pod) = manifest.split_once("---\n").context("two documents")?;
    ensure!(account.contains("kind: ServiceAccount"), "{account}");
    mesh.registry.write("pod-unsigned.yaml", pod)?;
    poll::until_true("the agent knows that the account is deleted", SOON, || {
        let revoked = mesh.agent_state(NODE)?["revoked_identities"].to_string();
        Ok(revoked.contains("/ns/early/sa/unsigned"))
    })?;
    let sandbox = Sandbox::of(mesh, "unsigned", "early");
    sandbox.run(mesh, "ADD")?.refused(100, "certificate")?;
    let listed = mesh.listed("unsigned")?.context("captured")?;
    ensure!(listed["proven"] == false, "proven without a certificate: {listed}");
    // The account is back, and the runtime tries again.
    write_scheduled(mesh, "unsigned", "early")?;
    sandbox.run(mesh, "ADD")?.ok().context("with the account")?;
    ensure!(mesh.listed("unsigned")?.is_some_and(|listed| listed["proven"] == true));
    sandbox.run(mesh, "DEL")?.ok()?;
    mesh.registry.remove("pod-unsigned.yaml")?;
    mesh.topology.remove_pod("unsigned");
    Ok(())
}

/// Whatever uid a namespace is brought with: another Pod's is not enrolled under it.
pub fn wrong_pairing(mesh: &mut Mesh) -> Result<()> {
    label(mesh, "early", "enabled")?;
    wait_for_list(mesh, "early")?;
    mesh.topology.add_pod("robbed", NODE, 53)?;
    write_scheduled(mesh, "robbed", "early")?;
    let neighbour = Running::start(mesh, "neighbour", "outside", 54)?;
    let enrolled = Running::start(mesh, "settled", "early", 55)?;
    let settled = wait_until_proven(mesh, "settled")?;
    for (other, word) in [("neighbour", "uid-neighbour"), ("settled", "uid-settled")] {
        let mixed = Sandbox {
            of: "robbed",
            ..Sandbox::of(mesh, other, "early")
        };
        mixed.run(mesh, "ADD")?.refused(100, word)?;
        ensure!(mesh.listed("robbed")?.is_none(), "enrolled with the namespace of {other}");
    }
    ensure!(
        mesh.listed("settled")?
            .is_some_and(|listed| listed["netns_cookie"] == settled["netns_cookie"])
    );
    // A uid with another name than the control plane has for it.
    let renamed = Sandbox {
        namespace: "shop",
        ..Sandbox::of(mesh, "robbed", "early")
    };
    renamed.run(mesh, "ADD")?.refused(100, "early/robbed")?;
    // Its own namespace is taken; one that is not a member's passes untouched.
    Sandbox::of(mesh, "robbed", "early").run(mesh, "ADD")?.ok()?;
    Sandbox::of(mesh, "neighbour", "outside").run(mesh, "ADD")?.ok()?;
    ensure!(mesh.listed("neighbour")?.is_none(), "a Pod outside of the mesh was enrolled");
    Sandbox::of(mesh, "robbed", "early").run(mesh, "DEL")?.ok()?;
    mesh.registry.remove("pod-robbed.yaml")?;
    mesh.topology.remove_pod("robbed");
    neighbour.end(mesh)?;
    enrolled.end(mesh)
}

const CONFLIST: &str =
    "{\n  \"cniVersion\": \"1.0.0\",\n  \"name\": \"net\",\n  \"plugins\": [\n    {\"type\": \"ptp\"}\n  ]\n}\n";

pub fn installed(mesh: &mut Mesh) -> Result<()> {
    let folder = mesh.topology.node(NODE).folder.clone();
    let (conf_dir, bin_dir) = (folder.join("net.d"), folder.join("cni-bin"));
    for folder in [&conf_dir, &bin_dir] {
        std::fs::create_dir(folder)?;
    }
    let conflist = conf_dir.join("10-net.conflist");
    let text = |path: &Path| path.to_str().map(str::to_owned).context("a path");
    let places = [
        "--cni-conf-dir".to_owned(),
        text(&conf_dir)?,
        "--cni-bin-dir".to_owned(),
        text(&bin_dir)?,
    ];
    let places: Vec<&str> = places.iter().map(String::as_str).collect();
    std::fs::write(&conflist, "{ \"plugins\": ")?;
    // No reason for an agent's init step to fail: it is told, the list stays as it is, and the agent tries again.
    let told = mesh.agent_command(NODE, "install-cni", &places)?;
    ensure!(
        told.contains("cannot be put") && told.contains("10-net.conflist"),
        "a malformed list was taken: {told}"
    );
    ensure!(
        std::fs::read_to_string(&conflist)? == "{ \"plugins\": ",
        "a malformed list was changed"
    );
    std::fs::write(&conflist, CONFLIST)?;
    let run_dir = text(&mesh.topology.node(NODE).run_dir())?;
    let is_in = || -> Result<bool> {
        let list: Value = serde_json::from_str(&std::fs::read_to_string(&conflist)?)?;
        Ok(list["plugins"][1]["type"] == "mesh-cni" && list["plugins"][1]["runDir"] == run_dir.as_str())
    };
    mesh.agent_command(NODE, "install-cni", &places)?;
    ensure!(is_in()? && bin_dir.join("mesh-cni").is_file(), "not installed");
    // Another tool writes the list anew: the running agent puts the entry back.
    std::fs::write(&conflist, CONFLIST)?;
    mesh.terminate_agent(NODE)?;
    mesh.launch_agent_with(NODE, &["--follow-pods", "--cni-conf-dir", places[1]])?;
    for _ in 0..2 {
        poll::until_true("the entry is put back", SOON, is_in)?;
        std::fs::write(&conflist, CONFLIST)?;
    }
    mesh.terminate_agent(NODE)?;
    mesh.launch_agent_with(NODE, &["--follow-pods"])?;
    mesh.wait_until_ready(NODE)?;
    mesh.agent_command(NODE, "install-cni", &places)?;
    // uninstall-cni has no --run-dir: it needs no agent.
    let output = mesh.topology.node(NODE).agent_place().run(
        &binaries::path("mesh-agent")?,
        &[&["uninstall-cni"], places.as_slice()].concat(),
        SOON,
    )?;
    output.ok("mesh-agent uninstall-cni")?;
    ensure!(std::fs::read_to_string(&conflist)? == CONFLIST, "the list is not as it was");
    ensure!(
        std::fs::read_dir(&bin_dir)?.count() == 0 && std::fs::read_dir(&conf_dir)?.count() == 1,
        "something was left"
    );
    Ok(())
}
