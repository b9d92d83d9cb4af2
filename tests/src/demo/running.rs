//! A running demo announces itself by a file, so that `demo exec` in another terminal finds its Pods.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use crate::manifests::{policy, principal};
use crate::mesh::Mesh;
use crate::process::Place;

/// Lies ready in the run's folder, to be copied into the registry.
pub const EXAMPLE_POLICY: &str = "deny-client.yaml";

#[derive(Serialize, Deserialize)]
struct State {
    pid: u32,
    /// Where `mesh-test-app` is.
    folder: PathBuf,
    pods: BTreeMap<String, PodState>,
}

#[derive(Serialize, Deserialize)]
struct PodState {
    netns: PathBuf,
    cgroup: PathBuf,
}

/// Removes the announcement when dropped.
pub struct Running(PathBuf);

impl Running {
    /// # Errors
    /// The file cannot be written.
    pub fn announce(mesh: &Mesh) -> Result<Self> {
        let rule = format!("[{{ from: [{{ principals: [{}] }}] }}]", principal("client"));
        let folder = mesh.topology.folder();
        std::fs::write(folder.join(EXAMPLE_POLICY), policy("deny-client", "server", "Deny", &rule))?;
        let pods = mesh
            .topology
            .pods()
            .map(|(name, pod)| {
                (
                    name.to_owned(),
                    PodState {
                        netns: pod.netns.path(),
                        cgroup: pod.cgroup.path().to_owned(),
                    },
                )
            })
            .collect();
        let state = State {
            pid: std::process::id(),
            folder: folder.to_owned(),
            pods,
        };
        let path = state_file();
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(&path, serde_json::to_vec_pretty(&state)?).with_context(|| format!("writing {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Runs a command in a Pod of the running demo, as an unprivileged application; answers its exit code.
///
/// # Errors
/// No demo runs, it has no such Pod, or the command cannot start.
pub fn exec(pod: &str, command: &[String]) -> Result<u8> {
    let path = state_file();
    let text = std::fs::read(&path).with_context(|| format!("no demo is running ({} is not there)", path.display()))?;
    let state: State = serde_json::from_slice(&text)?;
    if !Path::new(&format!("/proc/{}", state.pid)).exists() {
        bail!(
            "the demo that wrote {} is gone; start another by `cargo xtask demo`",
            path.display()
        );
    }
    let Some(found) = state.pods.get(pod) else {
        bail!(
            "the demo has no Pod {pod}; it has {}",
            state.pods.keys().cloned().collect::<Vec<_>>().join(", ")
        );
    };
    let (program, arguments) = command.split_first().context("which command?")?;
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let place = Place {
        netns: found.netns.clone(),
        cgroup: Some(found.cgroup.clone()),
        unprivileged: true,
    };
    let search = format!("{}:{}", state.folder.display(), std::env::var("PATH").unwrap_or_default());
    let mut command = place.command(Path::new(program), &arguments)?;
    // On the terminal it is the terminal's: Ctrl-C ends it.
    std::os::unix::process::CommandExt::process_group(&mut command, nix::unistd::getpgrp().as_raw());
    let status = command
        .env("PATH", search)
        .status()
        .with_context(|| format!("starting {program}"))?;
    Ok(status
        .code()
        .or(status.signal().map(|signal| 128 + signal))
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(1))
}

fn state_file() -> PathBuf {
    let base = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(|| PathBuf::from("/run"), PathBuf::from);
    base.join("culvert-demo").join("state.json")
}
