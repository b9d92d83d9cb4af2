//! The cluster as its administrator has it in hand.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::process::{Output, Place};

/// Beyond kubectl's own waiting.
const DEADLINE: Duration = Duration::from_secs(150);

#[derive(Debug)]
pub struct Kubectl {
    pub(super) binary: PathBuf,
    pub(super) kubeconfig: PathBuf,
    pub(super) place: Place,
    /// For manifests, and what it remembers of the API server.
    pub(super) folder: PathBuf,
}

impl Kubectl {
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// The same for another user's kubeconfig.
    #[must_use]
    pub fn by(&self, kubeconfig: PathBuf) -> Self {
        Self {
            binary: self.binary.clone(),
            kubeconfig,
            place: self.place.clone(),
            folder: self.folder.clone(),
        }
    }

    /// # Errors
    /// It cannot start, or does not end; that it fails is an answer.
    pub fn output(&self, arguments: &[&str]) -> Result<Output> {
        let kubeconfig = format!("--kubeconfig={}", self.kubeconfig.display());
        let cache = format!("--cache-dir={}", self.folder.join("kubectl-cache").display());
        let mut all = vec![kubeconfig.as_str(), cache.as_str()];
        all.extend(arguments);
        self.place.run(&self.binary, &all, DEADLINE)
    }

    /// Commands in a shell that has `kubectl` and this kubeconfig, as a person types them in a folder; the first that fails ends them.
    ///
    /// # Errors
    /// As [`Kubectl::output`].
    pub fn shell(&self, folder: &Path, commands: &str) -> Result<Output> {
        let tools = self.binary.parent().context("the folder of kubectl")?;
        let script = format!(
            "cd '{}' && export PATH='{}':\"$PATH\" KUBECONFIG='{}' && set -e\n{commands}",
            folder.display(),
            tools.display(),
            self.kubeconfig.display()
        );
        self.place.run(Path::new("/bin/sh"), &["-c", &script], DEADLINE)
    }

    /// What it prints.
    ///
    /// # Errors
    /// It fails: as it said.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        self.output(arguments)?.ok(&format!("kubectl {}", arguments.join(" ")))
    }

    /// Removes the Pods of a namespace that no kubelet has.
    ///
    /// # Errors
    /// As kubectl says.
    pub fn forget_pods(&self, namespace: &str) -> Result<()> {
        let now = ["--all", "--grace-period=0", "--force", "--wait=false"];
        self.run(&[&["-n", namespace, "delete", "pods"], &now[..]].concat()).map(drop)
    }

    /// One or more manifests as text.
    ///
    /// # Errors
    /// One is refused: as kubectl says.
    pub fn apply(&self, manifests: &str) -> Result<String> {
        let file = self.manifest(manifests)?;
        self.apply_file(&file)
    }

    /// `kubectl apply -f`.
    ///
    /// # Errors
    /// As [`Kubectl::apply`].
    pub fn apply_file(&self, file: &Path) -> Result<String> {
        self.run(&["apply", "-f", file.to_str().context("a path")?])
    }

    /// # Errors
    /// kubectl fails; that one is gone already is well.
    pub fn delete(&self, manifests: &str) -> Result<String> {
        let file = self.manifest(manifests)?;
        self.run(&["delete", "--ignore-not-found", "-f", file.to_str().context("a path")?])
    }

    fn manifest(&self, text: &str) -> Result<PathBuf> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = self.folder.join(format!("manifest-{number}.yaml"));
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }

    /// `kubectl get … -o json`.
    ///
    /// # Errors
    /// There is no such thing.
    pub fn get(&self, arguments: &[&str]) -> Result<Value> {
        let mut all = vec!["get", "-o", "json"];
        all.extend(arguments);
        let text = self.run(&all)?;
        serde_json::from_str(&text).context("kubectl's JSON")
    }

    /// Waits until a Deployment or DaemonSet ("daemonset/mesh-agent") has all its Pods, of its latest form, ready.
    ///
    /// # Errors
    /// It has them not within two minutes.
    pub fn rolled_out(&self, namespace: &str, workload: &str) -> Result<()> {
        self.run(&["-n", namespace, "rollout", "status", workload, "--timeout=120s"])
            .map(drop)
    }

    /// Waits for a condition ("Ready") of things ("pod/client", or "pod", "-l", "app=web").
    ///
    /// # Errors
    /// Not within two minutes.
    pub fn wait_for(&self, namespace: &str, condition: &str, things: &[&str]) -> Result<()> {
        let condition = format!("--for=condition={condition}");
        let mut all = vec!["-n", namespace, "wait", &condition, "--timeout=120s"];
        all.extend(things);
        self.run(&all).map(drop)
    }

    /// What the containers of a Pod (or of "daemonset/mesh-agent", …) have printed.
    ///
    /// # Errors
    /// kubectl fails.
    pub fn logs(&self, namespace: &str, pod: &str) -> Result<String> {
        self.run(&["-n", namespace, "logs", "--all-containers", "--prefix=false", pod])
    }

    /// Runs a command in a Pod.
    ///
    /// # Errors
    /// It cannot be started; that it fails is an answer.
    pub fn exec(&self, namespace: &str, pod: &str, command: &[&str]) -> Result<Output> {
        let mut all = vec!["-n", namespace, "exec", pod, "--"];
        all.extend(command);
        self.output(&all)
    }
}
