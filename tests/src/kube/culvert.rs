//! The mesh on a [`Cluster`], for the suites: what `deploy` has with the images that were just built, Pods to try it with, and what
//! becomes of their connections while something happens.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::remains::Remains;
use super::{APP_IMAGE, Cluster, Image};
use crate::binaries;
use crate::poll;
use crate::process::Output;
use crate::readme;
use crate::suite;
use crate::wire::Recorder;

pub const MESH: &str = "culvert-system";
pub const SHOP: &str = "shop";
/// Images are started, certificates signed, captures proven, and written to the API server.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// What a node of cgroup version 1 and 2 has beside the folders of version 1.
const UNIFIED: &str = "/sys/fs/cgroup/unified";
/// Where `cargo xtask test kube` says Helm is.
const HELM_VARIABLE: &str = "CULVERT_HELM";
/// Of this project, as [`load_images`] names them.
const PREFIX: &str = "culvert.test/";
const TAG: &str = "1";
const AGENT_CAPABILITIES: &str = "\"SYS_PTRACE\" \"SYS_RESOURCE\"";

#[must_use]
pub fn with_logs(cluster: &Cluster, error: anyhow::Error) -> anyhow::Error {
    let mut text = String::new();
    for workload in ["daemonset/mesh-agent", "deployment/mesh-control", "daemonset/mesh-uninstall"] {
        let arguments = [
            "-n",
            MESH,
            "logs",
            workload,
            "--all-pods=true",
            "--all-containers",
            "--prefix",
            "--tail=25",
        ];
        match cluster.kubectl().run(&arguments) {
            Ok(said) => text += &format!("--- the end of {workload}:\n{said}\n"),
            Err(error) => text += &format!("--- no logs of {workload}: {error:#}\n"),
        }
    }
    for what in [
        &["-n", MESH, "get", "pods", "-o", "wide"][..],
        &["-n", SHOP, "describe", "pods"],
    ] {
        text += &cluster.kubectl().run(what).unwrap_or_default();
    }
    cluster.with_logs(anyhow::anyhow!("{error:#}\n{text}"))
}

fn checkout() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"))
}

/// # Errors
/// One cannot be made, or is refused.
pub fn load_images(cluster: &Cluster) -> Result<()> {
    let agent = Image::new("culvert.test/mesh-agent:1")
        .program(&binaries::path("mesh-agent")?, "/mesh-agent")?
        .program(&binaries::path("mesh-cni")?, "/mesh-cni")?
        .entrypoint(&["/mesh-agent"]);
    let control = Image::new("culvert.test/mesh-control:1")
        .program(&binaries::path("mesh-control")?, "/mesh-control")?
        .entrypoint(&["/mesh-control"])
        .user(65532);
    cluster.load_image(&agent)?;
    cluster.load_image(&control)
}

/// Where the README's commands are run: a copy of `deploy` with these images, for these nodes.
#[must_use]
pub fn folder(cluster: &Cluster) -> PathBuf {
    cluster.folder().join("checkout")
}

/// Of nodes and Pods before the mesh came.
///
/// # Errors
/// [`deploy`] and an installation have not been.
pub fn before(cluster: &Cluster) -> Result<Remains> {
    Ok(serde_json::from_slice(&std::fs::read(before_file(cluster))?)?)
}

fn before_file(cluster: &Cluster) -> PathBuf {
    cluster.folder().join("before.json")
}

/// By docs/DEPLOY.md and the README, without Helm.
///
/// # Errors
/// It does not come up.
pub fn install(cluster: &Cluster) -> Result<()> {
    load_images(cluster)?;
    let shipped = checkout().join("deploy");
    let here = folder(cluster).join("deploy");
    std::fs::create_dir_all(here.join("crds"))?;
    for file in std::fs::read_dir(shipped.join("crds"))? {
        let file = file?;
        std::fs::copy(file.path(), here.join("crds").join(file.file_name()))?;
    }
    for (file, images) in [
        ("culvert.yaml", &["mesh-agent", "mesh-control"][..]),
        ("uninstall.yaml", &["mesh-agent"][..]),
    ] {
        let mut manifests = std::fs::read_to_string(shipped.join(file))?;
        for name in images {
            let shipped = format!("image: {name}:{}", env!("CARGO_PKG_VERSION"));
            ensure!(manifests.contains(&shipped), "deploy/{file} has no {shipped}");
            manifests = manifests.replace(&shipped, &format!("image: {PREFIX}{name}:{TAG}"));
        }
        if has_version_1(cluster)? {
            manifests = manifests.replace("path: /sys/fs/cgroup\n", &format!("path: {UNIFIED}\n"));
        }
        if !has_sys_resource()? {
            // A runtime gives nobody what it does not have itself. Without it the agent has the descriptors that its hard limit allows.
            manifests = manifests.replace("                - SYS_RESOURCE\n", "");
        }
        std::fs::write(here.join(file), manifests)?;
    }
    let said = run_readme(cluster, "kube_mesh", "rollout status daemonset/mesh-agent")?;
    ensure!(said.contains("successfully rolled out"), "{said}");
    Ok(())
}

fn has_version_1(cluster: &Cluster) -> Result<bool> {
    Ok(cluster.node(1).run(&["test", "-d", UNIFIED], poll::SOON)?.status.success())
}

/// By docs/DEPLOY.md, with Helm.
///
/// # Errors
/// It does not come up.
pub fn install_with_helm(cluster: &Cluster) -> Result<()> {
    load_images(cluster)?;
    let shipped = checkout().join("deploy/chart/culvert");
    let chart = chart(cluster);
    std::fs::create_dir_all(chart.join("templates"))?;
    for folder in ["", "templates"] {
        for file in std::fs::read_dir(shipped.join(folder))? {
            let file = file?;
            if file.file_type()?.is_file() {
                std::fs::copy(file.path(), chart.join(folder).join(file.file_name()))?;
            }
        }
    }
    if !has_sys_resource()? {
        let file = chart.join("templates/agent.yaml");
        let text = std::fs::read_to_string(&file)?;
        ensure!(
            text.contains(AGENT_CAPABILITIES),
            "the chart's capabilities have another form"
        );
        std::fs::write(&file, text.replace(" \"SYS_RESOURCE\"", ""))?;
    }
    let crds = checkout().join("deploy/crds");
    cluster
        .kubectl()
        .run(&["apply", "--server-side", "-f", crds.to_str().context("a path")?])?;
    helm(cluster, &install_command("install", &[], has_version_1(cluster)?))?;
    cluster.kubectl().rolled_out(MESH, "deployment/mesh-control")?;
    cluster.kubectl().rolled_out(MESH, "daemonset/mesh-agent")
}

fn chart(cluster: &Cluster) -> PathBuf {
    cluster.folder().join("chart")
}

fn install_command(verb: &str, values: &[&str], has_version_1: bool) -> String {
    let mut command = format!(
        "{verb} culvert ./chart --namespace {MESH} --create-namespace --set image.prefix={PREFIX} --set-string image.tag={TAG}"
    );
    if verb == "upgrade" {
        command = command.replace(" --create-namespace", "");
    }
    if has_version_1 {
        command += &format!(" --set agent.cgroupRoot={UNIFIED}");
    }
    for value in values {
        command += &format!(" --set {value}");
    }
    command
}

/// `helm upgrade` with these values beside those of the installation.
///
/// # Errors
/// As Helm says.
pub fn upgrade_with_helm(cluster: &Cluster, values: &[&str]) -> Result<String> {
    helm(cluster, &install_command("upgrade", values, has_version_1(cluster)?))
}

/// Helm's command line, in the folder with the chart.
///
/// # Errors
/// As Helm says.
pub fn helm(cluster: &Cluster, arguments: &str) -> Result<String> {
    let program = std::env::var_os(HELM_VARIABLE).ok_or_else(|| {
        suite::skip(&format!(
            "{HELM_VARIABLE} is not set (`cargo xtask test kube` sets it, where there is a Helm)"
        ))
    })?;
    let command = format!(
        "HELM_NO_PLUGINS=1 HELM_CACHE_HOME=./helm HELM_CONFIG_HOME=./helm HELM_DATA_HOME=./helm '{}' {arguments}",
        program.display()
    );
    cluster.kubectl().shell(cluster.folder(), &command)?.ok(&command)
}

/// Runs the block of the README that `runner` runs and that has this in it, and answers what it printed.
///
/// # Errors
/// There is not just one, or it fails.
pub fn run_readme(cluster: &Cluster, runner: &str, with: &str) -> Result<String> {
    let blocks = readme::run_by(runner)?;
    let mut chosen = blocks.iter().filter(|block| block.text.contains(with));
    let (Some(block), None) = (chosen.next(), chosen.next()) else {
        bail!("not one block of the README that {runner} runs has {with:?}");
    };
    if block.language == "yaml" {
        std::fs::write(folder(cluster).join("deny.yaml"), &block.text)?;
        return Ok(String::new());
    }
    cluster.kubectl().shell(&folder(cluster), &block.text)?.ok(&block.text)
}

fn has_sys_resource() -> Result<bool> {
    const CAP_SYS_RESOURCE: u32 = 24;
    let status = std::fs::read_to_string("/proc/self/status")?;
    let bounding = status
        .lines()
        .find_map(|line| line.strip_prefix("CapBnd:"))
        .context("CapBnd")?;
    Ok(u64::from_str_radix(bounding.trim(), 16)? & (1 << CAP_SYS_RESOURCE) != 0)
}

/// A Pod of a service account of its own.
#[must_use]
pub fn pod(name: &str, node: u8, command: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: ServiceAccount
metadata: {{name: {name}, namespace: {SHOP}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {SHOP}, labels: {{app: {name}}}}}
spec:
  serviceAccountName: {name}
  nodeSelector: {{kubernetes.io/hostname: node-{node}}}
  terminationGracePeriodSeconds: 1
  containers:
    - name: app
      image: {APP_IMAGE}
      command: {command}
      resources: {{requests: {{cpu: 10m, memory: 8Mi}}, limits: {{memory: 64Mi}}}}
---
"#
    )
}

/// A Pod that answers at 8080 and 9000, and its Service.
#[must_use]
pub fn server(name: &str, node: u8) -> String {
    let command = format!(r#"[mesh-test-app, serve, {name}, "8080", "9000"]"#);
    pod(name, node, &command)
        + &format!(
            r#"
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {SHOP}}}
spec:
  selector: {{app: {name}}}
  ipFamilyPolicy: RequireDualStack
  ports: [{{name: http, port: 80, targetPort: 8080}}]
---
"#
        )
}

/// Before the mesh is installed: the namespace, a client and a server on node 1, and a server on node 2.
///
/// # Errors
/// They do not start.
pub fn deploy(cluster: &Cluster) -> Result<()> {
    let namespace = format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {SHOP}}}\n---\n");
    let manifests = namespace + &pod("client", 1, "[sleep, inf]") + &server("near", 1) + &server("server", 2);
    cluster.kubectl().apply(&manifests)?;
    let pods = ["pod/client", "pod/near", "pod/server"];
    cluster.kubectl().wait_for(SHOP, "Ready", &pods)?;
    let before = Remains::of(cluster, &["client", "near", "server"])?;
    Ok(std::fs::write(before_file(cluster), serde_json::to_vec(&before)?)?)
}

/// What is known of a Pod's capture: "proven", or null.
///
/// # Errors
/// There is no such Pod.
pub fn capture(cluster: &Cluster, pod: &str) -> Result<Value> {
    let pod = cluster.kubectl().get(&["-n", SHOP, "pod", pod])?;
    Ok(pod["metadata"]["annotations"]["culvert.dev/capture"].clone())
}

/// # Errors
/// One is not.
pub fn until_proven(cluster: &Cluster, pods: &[&str]) -> Result<()> {
    for pod in pods {
        poll::until_true(&format!("{pod} is proven to be in the mesh"), PATIENCE, || {
            Ok(capture(cluster, pod)? == "proven")
        })?;
    }
    Ok(())
}

/// Of a Service: by it a connection needs no DNS, whose Pods may be on the node that something happens to.
///
/// # Errors
/// There is none.
pub fn service_address(cluster: &Cluster, service: &str) -> Result<String> {
    let service = cluster.kubectl().get(&["-n", SHOP, "service", service])?;
    Ok(service["spec"]["clusterIP"].as_str().context("a cluster address")?.to_owned())
}

/// What the client is answered.
///
/// # Errors
/// It is not answered.
pub fn get(cluster: &Cluster, url: &str) -> Result<String> {
    let output = cluster.kubectl().exec(SHOP, "client", &["mesh-test-app", "get", url])?;
    output.ok(&format!("GET {url} by the client's Pod"))
}

/// The access-log lines of both agents, of a connection to this Pod.
///
/// # Errors
/// The logs cannot be read.
pub fn lines_of(cluster: &Cluster, pod: &str) -> Result<Vec<Value>> {
    let arguments = [
        "-n",
        MESH,
        "logs",
        "daemonset/mesh-agent",
        "--all-pods=true",
        "--container=mesh-agent",
        "--since=5m",
    ];
    let text = cluster.kubectl().run(&arguments)?;
    let lines = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(&line[line.find('{')?..]).ok());
    Ok(lines.filter(|line| line["destination_workload"] == pod).collect())
}

/// Whether what the client asks for can be read on the wire between the nodes, and what it was answered.
///
/// # Errors
/// Nothing can be recorded.
pub fn is_on_the_wire(cluster: &Cluster, host: &str) -> Result<(bool, Result<String>)> {
    let marker = format!("marker-{:016x}", rand::random::<u64>());
    let recorder = Recorder::start(cluster.node(1).netns(), "eth0")?;
    let answer = get(cluster, &format!("http://{host}/{marker}"));
    let recording = recorder.finish()?;
    ensure!(recording.frames > 0, "nothing was recorded");
    Ok((recording.contains(marker.as_bytes()), answer))
}

/// A Pod's only container, entered by its node: without the API server.
#[derive(Clone, Debug)]
pub struct Inside {
    /// Counted from 1.
    node: usize,
    /// As the node counts.
    pid: String,
}

/// # Errors
/// It does not run.
pub fn inside(cluster: &Cluster, pod: &str) -> Result<Inside> {
    let object = cluster.kubectl().get(&["-n", SHOP, "pod", pod])?;
    let name = object["spec"]["nodeName"].as_str().context("a node")?;
    let at = cluster.nodes().iter().position(|node| node.name() == name);
    let node = at.context("a node's name")? + 1;
    let id = object["status"]["containerStatuses"][0]["containerID"]
        .as_str()
        .context("a container")?;
    let id = id.rsplit('/').next().context("a container's id")?;
    let find = format!("grep -ls {id} /proc/[0-9]*/cgroup | head -n 1 | cut -d/ -f3");
    let pid = cluster
        .node(node)
        .run(&["sh", "-c", &find], poll::SOON)?
        .ok("its first process")?;
    ensure!(!pid.trim().is_empty(), "{pod}: no process of {id} on {name}");
    let pid = pid.trim().to_owned();
    Ok(Inside { node, pid })
}

impl Inside {
    /// Its network namespace, as this machine sees it.
    ///
    /// # Errors
    /// The node is off.
    pub fn netns(&self, cluster: &Cluster) -> Result<PathBuf> {
        let node = cluster.node(self.node).pid()?;
        Ok(PathBuf::from(format!("/proc/{node}/root/proc/{}/ns/net", self.pid)))
    }

    /// # Errors
    /// It cannot start, or does not end.
    pub fn shell(&self, cluster: &Cluster, script: &str) -> Result<Output> {
        // Programs of the mesh are attached to cgroups: it is the container's that counts, not that of this test.
        let enter = "for root in /sys/fs/cgroup/unified /sys/fs/cgroup; do [ ! -f $root/cgroup.controllers ] || break; done; \
                     echo 0 > $root$(sed -n s/^0:://p /proc/$0/cgroup)/cgroup.procs && \
                     exec nsenter -t $0 -m -n -u -i -p /bin/sh -c \"$1\"";
        let command = ["sh", "-c", enter, &self.pid, script];
        cluster.node(self.node).run(&command, PATIENCE)
    }
}

/// New connections, one after the other, in a Pod, until it is ended. Needs no API server.
#[derive(Debug)]
pub struct Load {
    pod: Inside,
    folder: String,
}

#[derive(Debug)]
pub struct Counted {
    pub made: u32,
    pub failed: u32,
    /// The last of them.
    pub errors: String,
    /// What was answered, a line each.
    pub answers: String,
}

impl Load {
    /// # Errors
    /// The Pod does not run.
    pub fn begin(cluster: &Cluster, pod: &str, url: &str) -> Result<Self> {
        Self::begin_in(cluster, inside(cluster, pod)?, url)
    }

    /// # Errors
    /// As [`Inside::shell`].
    pub fn begin_in(cluster: &Cluster, pod: Inside, url: &str) -> Result<Self> {
        let folder = format!("/tmp/load-{:08x}", rand::random::<u32>());
        let each = format!("/bin/mesh-test-app get {url} >>answers 2>>errors || f=$((f+1))");
        let all = format!("n=0; f=0; while [ ! -e stop ]; do n=$((n+1)); {each}; done; echo \"$n $f\" > count; mv count done");
        let begin = format!("mkdir -p {folder} && cd {folder} && ({all}) </dev/null >/dev/null 2>&1 &");
        pod.shell(cluster, &begin)?.ok("the load")?;
        Ok(Self { pod, folder })
    }

    /// # Errors
    /// It does not end.
    pub fn end(self, cluster: &Cluster) -> Result<Counted> {
        let read = |file: &str| {
            let script = format!("tail -c 60000 {}/{file} 2>/dev/null; true", self.folder);
            self.pod.shell(cluster, &script)?.ok(file)
        };
        let stop = format!("touch {}/stop", self.folder);
        self.pod.shell(cluster, &stop)?.ok("its end")?;
        let done = poll::until("the load's count", PATIENCE, || {
            let text = read("done")?;
            Ok((!text.trim().is_empty()).then_some(text))
        })?;
        let (made, failed) = done.trim().split_once(' ').context("two numbers")?;
        Ok(Counted {
            made: made.parse()?,
            failed: failed.parse()?,
            errors: read("errors")?.chars().take(2_000).collect(),
            answers: read("answers")?,
        })
    }
}

impl Counted {
    /// # Errors
    /// One failed, or there were too few for that to say anything.
    pub fn none_failed(&self, during: &str) -> Result<()> {
        ensure!(self.made > 20, "only {} connections during {during}", self.made);
        ensure!(
            self.failed == 0,
            "{} of {} failed during {during}: {}",
            self.failed,
            self.made,
            self.errors
        );
        Ok(())
    }
}
