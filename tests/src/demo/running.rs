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
/// A file for each demo that runs, named by its process id. A fixed place: two terminals need not agree on
/// `XDG_RUNTIME_DIR` or `TMPDIR`, and a demo is root's anyway.
pub const FOLDER: &str = "/run/culvert-demo";
/// Which demo `exec` means, by its process id, where several run.
pub const CHOICE_VARIABLE: &str = "CULVERT_DEMO";

#[derive(Serialize, Deserialize)]
struct State {
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
            folder: folder.to_owned(),
            pods,
        };
        std::fs::create_dir_all(FOLDER)?;
        // What a killed demo left.
        for (pid, path) in announced() {
            if !is_alive(pid) {
                let _ = std::fs::remove_file(path);
            }
        }
        let path = announcement(std::process::id());
        std::fs::write(&path, serde_json::to_vec_pretty(&state)?).with_context(|| format!("writing {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
        // The last one; with another demo's file in it, it stays.
        let _ = std::fs::remove_dir(FOLDER);
    }
}

/// Runs a command in a Pod of the running demo, as an unprivileged application; answers its exit code.
///
/// # Errors
/// No demo runs, or several and none is chosen; it has no such Pod, or the command cannot start.
pub fn exec(pod: &str, command: &[String]) -> Result<u8> {
    let path = announcement(chosen()?);
    let text = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let state: State = serde_json::from_slice(&text)?;
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

/// The process id of the demo that is meant.
fn chosen() -> Result<u32> {
    let alive: Vec<u32> = announced().map(|(pid, _)| pid).filter(|pid| is_alive(*pid)).collect();
    let wanted = std::env::var(CHOICE_VARIABLE).ok();
    choose(&alive, wanted.as_deref())
}

fn choose(alive: &[u32], wanted: Option<&str>) -> Result<u32> {
    match (alive, wanted) {
        ([], _) => bail!("no demo is up; start one by `cargo xtask demo`, and wait until its claims are proven"),
        (_, Some(wanted)) => match alive.iter().find(|pid| pid.to_string() == wanted) {
            Some(pid) => Ok(*pid),
            None => bail!("{CHOICE_VARIABLE}={wanted} is none of the demos that are up: {alive:?}"),
        },
        ([pid], None) => Ok(*pid),
        _ => bail!("several demos are up: choose one by {CHOICE_VARIABLE}=<process id> of {alive:?}"),
    }
}

fn announced() -> impl Iterator<Item = (u32, PathBuf)> {
    let entries = std::fs::read_dir(FOLDER).into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let path = entry.path();
        let pid = path.file_stem()?.to_str()?.parse().ok()?;
        Some((pid, path))
    })
}

fn announcement(pid: u32) -> PathBuf {
    Path::new(FOLDER).join(format!("{pid}.json"))
}

fn is_alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_demo_is_meant_without_a_word_and_several_need_one() {
        assert_eq!(choose(&[7], None).unwrap(), 7);
        assert_eq!(choose(&[7, 8], Some("8")).unwrap(), 8);
        for (alive, wanted, says) in [
            (&[][..], None, "no demo is up"),
            (&[7, 8], None, "several demos"),
            (&[7], Some("8"), "none of the demos"),
        ] {
            let error = choose(alive, wanted).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
