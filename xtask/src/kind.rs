//! A cluster of kind, Kubernetes in Docker, for the README's quick start. Docker, kind and kubectl are a person's own, and neither
//! installed nor started.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use crate::images::{self, APP_IMAGE, IMAGES};
use crate::tools;
use crate::workspace::Workspace;

/// What runs on it.
pub const SUITE: &str = "kube_readme";
/// Names the kubeconfig to the suite.
pub const KUBECONFIG_VARIABLE: &str = "CULVERT_TEST_KUBECONFIG";

const CONFIG: &str = "\
kind: Cluster
apiVersion: kind.x-k8s.io/v1alpha4
nodes: [{role: control-plane}, {role: worker}, {role: worker}]
";
/// Its nodes are containers, in which systemd does not mount what it mounts on a machine.
const MOUNT_BPF: &str = "mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf";

/// Deleted with its owner.
pub struct Cluster {
    name: String,
    folder: PathBuf,
}

/// # Errors
/// What is missing.
pub fn expect_tools() -> Result<()> {
    let missing: Vec<&str> = ["docker", "kind", "kubectl"]
        .into_iter()
        .filter(|name| tools::find_command(name).is_none())
        .collect();
    if !missing.is_empty() {
        bail!("please put {} into PATH: a cluster of kind needs it", missing.join(", "));
    }
    if tools::output(Command::new("docker").args(["info", "--format", "{{.ServerVersion}}"])).is_err() {
        bail!("Docker does not answer (`docker info`): please start it");
    }
    Ok(())
}

impl Cluster {
    /// Makes it, and brings the images to its nodes.
    ///
    /// # Errors
    /// The first step that failed; what there is of it by then is deleted.
    pub fn create(workspace: &Workspace) -> Result<Self> {
        let name = format!("culvert-{}", std::process::id());
        let cluster = Self {
            folder: workspace.target.join("kind").join(&name),
            name,
        };
        std::fs::create_dir_all(&cluster.folder)?;
        let config = cluster.folder.join("config.yaml");
        std::fs::write(&config, CONFIG)?;
        tools::run(
            cluster
                .kind(&["create", "cluster", "--wait", "180s"])
                .arg("--config")
                .arg(&config)
                .arg("--kubeconfig")
                .arg(cluster.kubeconfig()),
        )?;
        for node in tools::output(&mut cluster.kind(&["get", "nodes"]))?.lines() {
            tools::run(Command::new("docker").args(["exec", node, "sh", "-c", MOUNT_BPF]))?;
        }
        let binaries = workspace.build()?;
        for content in IMAGES.iter().chain([&APP_IMAGE]) {
            let (archive, _) = images::write(content, &binaries, &cluster.folder, env!("CARGO_PKG_VERSION"))?;
            tools::run(cluster.kind(&["load", "image-archive"]).arg(&archive))?;
            std::fs::remove_file(archive)?;
        }
        Ok(cluster)
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.join("kubeconfig")
    }

    fn kind(&self, arguments: &[&str]) -> Command {
        let mut kind = Command::new("kind");
        kind.args(arguments).args(["--name", &self.name]);
        kind
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let deleted = tools::run(self.kind(&["delete", "cluster"]).arg("--kubeconfig").arg(self.kubeconfig()));
        if let Err(error) = deleted {
            let name = &self.name;
            tools::say(&format!("the cluster is left ({error:#}): kind delete cluster --name {name}"));
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
