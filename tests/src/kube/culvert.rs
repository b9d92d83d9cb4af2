//! The mesh on a cluster, as the README deploys it, with the images that were just built.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::cluster::Cluster;
use crate::binaries::{self, Build};
use crate::poll::{self, SOON};

/// The namespace of its own.
pub const NAMESPACE: &str = "culvert-system";
/// Of the images that are loaded here.
pub(super) const IMAGE_PREFIX: &str = "culvert.test/";
/// What a node of cgroup version 1 and 2 has beside the folders of version 1.
pub(super) const UNIFIED: &str = "/sys/fs/cgroup/unified";
/// Images are started, certificates signed, captures proven, and written to the API server.
const PATIENCE: Duration = Duration::from_secs(120);
/// Of each agent, on its node's address.
const METRICS_PORT: u16 = 15020;

/// The tag of a build's images.
#[must_use]
pub fn image_tag(build: Build) -> &'static str {
    match build {
        Build::This => "1",
        Build::Other => "2",
    }
}

pub(super) fn image_name(name: &str, build: Build) -> String {
    format!("{IMAGE_PREFIX}{name}:{}", image_tag(build))
}

/// Loads the images of `cargo xtask images`, as the manifests name them (`mesh-agent:<version>`), and as the chart does with the tests'
/// prefix and the build's tag.
///
/// # Errors
/// One was not made, or is refused.
pub fn load_images(cluster: &Cluster, build: Build) -> Result<()> {
    for name in ["mesh-agent", "mesh-control"] {
        cluster.load_archive(&build.image(name)?)?;
        let shipped = format!("docker.io/library/{name}:{}", env!("CARGO_PKG_VERSION"));
        cluster.tag_image(&shipped, &image_name(name, build))?;
    }
    Ok(())
}

/// What is deployed from.
pub(super) fn shipped() -> Result<PathBuf> {
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the checkout")?;
    Ok(checkout.join("deploy"))
}

/// Loads the images and writes `deploy` for these nodes. Answers the folder where it is, as on the README's reader's machine.
///
/// # Errors
/// The first step that failed, as it said.
pub fn prepare(cluster: &Cluster) -> Result<PathBuf> {
    load_images(cluster, Build::This)?;
    let shipped = shipped()?;
    let folder = folder(cluster);
    let here = folder.join("deploy");
    std::fs::create_dir_all(here.join("crds"))?;
    for file in std::fs::read_dir(shipped.join("crds"))? {
        let file = file?;
        std::fs::copy(file.path(), here.join("crds").join(file.file_name()))?;
    }
    for file in ["culvert.yaml", "uninstall.yaml"] {
        let manifests = std::fs::read_to_string(shipped.join(file))?;
        let manifests = for_these_nodes(cluster, manifests).with_context(|| file.to_owned())?;
        std::fs::write(here.join(file), manifests)?;
    }
    Ok(folder)
}

/// Prepares and applies it, and waits until it is rolled out.
///
/// # Errors
/// The first step that failed, as it said.
pub fn deploy(cluster: &Cluster) -> Result<()> {
    let here = prepare(cluster)?.join("deploy");
    for what in ["crds", "culvert.yaml"] {
        let path = here.join(what).display().to_string();
        cluster.kubectl().run(&["apply", "--server-side", "-f", &path])?;
    }
    for workload in ["deployment/mesh-control", "daemonset/mesh-agent"] {
        cluster.kubectl().rolled_out(NAMESPACE, workload)?;
    }
    Ok(())
}

/// Where [`prepare`] writes, and the README's commands are run.
#[must_use]
pub fn folder(cluster: &Cluster) -> PathBuf {
    cluster.folder().join("checkout")
}

/// What an agent has proven of a Pod, as its annotation says it; `null` of one that is in no mesh.
///
/// # Errors
/// There is no such Pod.
pub fn capture(cluster: &Cluster, namespace: &str, pod: &str) -> Result<Value> {
    let pod = cluster.kubectl().get(&["-n", namespace, "pod", pod])?;
    Ok(pod["metadata"]["annotations"]["culvert.dev/capture"].clone())
}

/// Waits until the agents have proven these Pods' capture.
///
/// # Errors
/// One is not in time.
pub fn until_proven(cluster: &Cluster, namespace: &str, pods: &[&str]) -> Result<()> {
    for pod in pods {
        let what = format!("{pod} is proven to be in the mesh");
        poll::until_true(&what, PATIENCE, || Ok(capture(cluster, namespace, pod)? == "proven"))?;
    }
    Ok(())
}

/// The access-log lines of every agent that match.
///
/// # Errors
/// kubectl fails.
pub fn access_log(cluster: &Cluster, wanted: impl Fn(&Value) -> bool) -> Result<Vec<Value>> {
    let text = cluster.kubectl().run(&[
        "-n",
        NAMESPACE,
        "logs",
        "daemonset/mesh-agent",
        "--all-pods=true",
        "--container=mesh-agent",
        "--since=5m",
    ])?;
    let lines = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(&line[line.find('{')?..]).ok());
    Ok(lines.filter(wanted).collect())
}

/// Where the metrics of a node's agent are.
#[must_use]
pub fn metrics_url(cluster: &Cluster, node: usize) -> String {
    format!("http://{}:{METRICS_PORT}/metrics", cluster.node(node).address())
}

/// The metrics of a node's agent.
///
/// # Errors
/// They cannot be read.
pub fn metrics(cluster: &Cluster, node: usize) -> Result<String> {
    let program = binaries::path("mesh-test-app")?;
    let script = format!("{} get {}", program.display(), metrics_url(cluster, node));
    cluster.kubectl().shell(cluster.folder(), &script)?.ok(&script)
}

/// For failure output: the ends of the mesh's logs, and its Pods.
pub fn say_logs(cluster: &Cluster) {
    let say = |what: &str, arguments: &[&str]| {
        let said = cluster.kubectl().run(arguments);
        let said = said.unwrap_or_else(|error| format!("none: {error:#}"));
        crate::suite::say(&format!("--- {what}:\n{said}"));
    };
    for workload in ["daemonset/mesh-agent", "deployment/mesh-control", "daemonset/mesh-uninstall"] {
        let arguments = [
            "-n",
            NAMESPACE,
            "logs",
            workload,
            "--all-pods=true",
            "--all-containers",
            "--prefix",
            "--tail=25",
        ];
        say(&format!("the end of {workload}"), &arguments);
    }
    say("the mesh's Pods", &["-n", NAMESPACE, "get", "pods", "-o", "wide"]);
}

/// The shipped manifests with what this machine has and has not.
fn for_these_nodes(cluster: &Cluster, mut manifests: String) -> Result<String> {
    if has_version_1(cluster)? {
        manifests = manifests.replace("path: /sys/fs/cgroup\n", &format!("path: {UNIFIED}\n"));
    }
    if !has_sys_resource()? {
        // A runtime gives nobody what it does not have itself. Without it the agent has the descriptors that its hard limit allows.
        crate::suite::say("this machine has no CAP_SYS_RESOURCE to give: the agents are deployed without it");
        manifests = manifests.replace("                - SYS_RESOURCE\n", "");
    }
    Ok(manifests)
}

/// Whether its nodes have cgroups of version 1, too.
pub(super) fn has_version_1(cluster: &Cluster) -> Result<bool> {
    Ok(cluster.node(1).run(&["test", "-d", UNIFIED], SOON)?.status.success())
}

pub(super) fn has_sys_resource() -> Result<bool> {
    const CAP_SYS_RESOURCE: u32 = 24;
    let status = std::fs::read_to_string("/proc/self/status")?;
    let bounding = status
        .lines()
        .find_map(|line| line.strip_prefix("CapBnd:"))
        .context("CapBnd")?;
    Ok(u64::from_str_radix(bounding.trim(), 16)? & (1 << CAP_SYS_RESOURCE) != 0)
}
