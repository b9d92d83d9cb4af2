//! `mesh-agent uninstall`: the node becomes as it was before the mesh.
//!
//! A running agent is taken over as its successor would: until its programs are detached it serves, so that no new connection fails,
//! and then it drains the connections that it carries and never comes back to its Pods. A dead agent's lock is free.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use http::StatusCode;
use parking_lot::Mutex;
use tokio::signal::unix::{SignalKind, signal};

use super::own_readiness;
use crate::admin::Page;
use crate::capture::kernel::Kernel;
use crate::capture::{self, Capture};
use crate::cni_install;
use crate::config::UninstallArgs;
use crate::local::handover::{self, Hello, Inherited};
use crate::local::{self, SocketError};

/// An agent that enrols a Pod at this moment, or starts, is asked again.
const CLAIM_TRIES: u32 = 15;
const CLAIM_RETRY: Duration = Duration::from_secs(1);
/// What was redirected just before the programs went is still to be accepted.
const ACCEPT_GRACE: Duration = Duration::from_millis(300);
/// Between two looks of one that stays.
const LOOK: Duration = Duration::from_secs(5);

/// What was removed. Nothing: the node was clean.
#[derive(Debug, Default, PartialEq, Eq)]
struct Removed {
    lines: Vec<String>,
    /// What could not be.
    failed: Vec<String>,
    /// A running agent's connections are to be waited for.
    from_running: bool,
}

/// # Errors
/// Something could not be removed, and with --ready-socket nothing is left running either.
pub async fn run(args: UninstallArgs, say: impl Fn(&str) -> anyhow::Result<()>) -> anyhow::Result<()> {
    capture::use_settings_at(&args.sysctl_root);
    let Some(ready_socket) = &args.ready_socket else {
        let removed = pass(&args).await;
        let is_clean = removed.lines.is_empty();
        tell(&removed, &say)?;
        if is_clean {
            say("nothing of the mesh is on this node")?;
        }
        return Ok(());
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let is_clean = Arc::new(Mutex::new(false));
    let shown = is_clean.clone();
    let listener = own_readiness::listen(ready_socket)?;
    tokio::spawn(own_readiness::serve(listener, move || {
        if *shown.lock() {
            Page::text(StatusCode::OK, "nothing of the mesh is on this node\n".to_owned())
        } else {
            Page::text(
                StatusCode::SERVICE_UNAVAILABLE,
                "missing: the node is not clean yet\n".to_owned(),
            )
        }
    }));
    loop {
        // A signal ends it between two passes: half of one is worse than a whole.
        let removed = pass(&args).await;
        *is_clean.lock() = removed.failed.is_empty();
        tell(&removed, &say)?;
        if !removed.lines.is_empty() {
            say("nothing more of the mesh is on this node")?;
        }
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

fn tell(removed: &Removed, say: impl Fn(&str) -> anyhow::Result<()>) -> anyhow::Result<()> {
    for line in &removed.lines {
        say(line)?;
    }
    if removed.failed.is_empty() {
        return Ok(());
    }
    bail!("not everything could be removed: {}", removed.failed.join("; "))
}

async fn pass(args: &UninstallArgs) -> Removed {
    let mut removed = Removed::default();
    let claim = {
        let args = args.clone();
        tokio::task::spawn_blocking(move || claim(&args))
            .await
            .map_err(anyhow::Error::from)
    };
    let claim = match claim.and_then(|claimed| claimed) {
        Ok(claim) => claim,
        // Its Pods are its own: nothing is taken away under its hands, and a new Pod would wait for it in vain.
        Err(error) => {
            removed.failed.push(format!("{error:#}"));
            return removed;
        }
    };
    if let Some(Claim::Running { inherited, .. }) = &claim {
        removed.from_running = true;
        removed.lines.push("the agent that ran here is taken over from".to_owned());
        removed.note("the kernel", detach(&args.pin_path));
        if !removed.failed.is_empty() {
            // The agent has its Pods still, and puts back what is missing.
            return removed;
        }
        if let Err(error) = local::leave(&args.run_dir) {
            removed.failed.push(error.to_string());
            return removed;
        }
        tokio::time::sleep(ACCEPT_GRACE).await;
        // From here on it does not put the CNI plugin's entry back.
        if let Err(error) = inherited.serving() {
            removed.failed.push(format!("the agent that runs here: {error}"));
            local::stay(&args.run_dir);
            return removed;
        }
    }
    removed.note("the CNI plugin", remove_plugin(args));
    // Held until the folder is gone.
    let lock = claim.map(Claim::into_lock);
    if removed.from_running {
        tokio::time::sleep(Duration::from_secs(args.drain_seconds)).await;
        // What that agent was about to write when it ended to follow the node.
        removed.note("the CNI plugin", remove_plugin(args));
    }
    if lock.is_some() || args.pin_path.exists() {
        let released = release(args).await;
        removed.note("Pods", released);
    }
    capture::sweep_probes(args.cgroup_root.as_deref());
    if lock.is_some() && removed.failed.is_empty() {
        removed.note("--run-dir", remove_folder(&args.run_dir));
    }
    removed
}

impl Removed {
    fn note(&mut self, what: &str, done: anyhow::Result<Vec<String>>) {
        match done {
            Ok(lines) => self.lines.extend(lines),
            Err(error) => self.failed.push(format!("{what}: {error:#}")),
        }
    }
}

/// The right to undo what is in the run directory.
enum Claim {
    Free(File),
    Running { inherited: Box<Inherited>, lock: OwnedFd },
}

impl Claim {
    /// Lets go of the Pods' listeners.
    fn into_lock(self) -> OwnedFd {
        match self {
            Self::Free(lock) => lock.into(),
            Self::Running { lock, .. } => lock,
        }
    }
}

/// `None`: no agent has ever run here, or it was cleaned. Blocks.
fn claim(args: &UninstallArgs) -> anyhow::Result<Option<Claim>> {
    if !args.run_dir.exists() {
        return Ok(None);
    }
    let mut why = String::new();
    for _ in 0..CLAIM_TRIES {
        match local::lock(&args.run_dir) {
            Ok(lock) => return Ok(Some(Claim::Free(lock))),
            Err(SocketError::InUse(_)) => {}
            Err(error) => return Err(error.into()),
        }
        let node = args
            .node
            .as_deref()
            .context("an agent runs on this node: end it first, or give its --node, so that it can be taken over from")?;
        match handover::take(&args.run_dir, &Hello::new(node, &args.pin_path)) {
            Ok(mut inherited) => {
                let (lock, _) = inherited.lock_and_socket()?;
                let inherited = Box::new(inherited);
                return Ok(Some(Claim::Running { inherited, lock }));
            }
            Err(error) => why = error.to_string(),
        }
        sleep(CLAIM_RETRY);
    }
    Err(anyhow!(
        "an agent runs on this node and is not to be taken over from ({why}): end it, and this goes on"
    ))
}

fn detach(pin_path: &Path) -> anyhow::Result<Vec<String>> {
    let report = Kernel::cleanup(pin_path)?;
    if report.directories.is_empty() {
        return Ok(Vec::new());
    }
    Ok(vec![format!(
        "{}: {} links detached, {} maps removed",
        pin_path.display(),
        report.links_detached,
        report.maps_removed
    )])
}

/// What is pinned still, then each Pod's rules and settings, and its record.
async fn release(args: &UninstallArgs) -> anyhow::Result<Vec<String>> {
    let mut lines = detach(&args.pin_path)?;
    if !args.run_dir.exists() {
        return Ok(lines);
    }
    let summary = Capture::cleanup(&args.run_dir, &args.pin_path).await?;
    if !summary.released.is_empty() {
        lines.push(format!(
            "{} Pods released: {}",
            summary.released.len(),
            summary.released.join(", ")
        ));
    }
    if summary.failed.is_empty() {
        return Ok(lines);
    }
    let failed: Vec<String> = summary.failed.iter().map(|(uid, error)| format!("{uid}: {error}")).collect();
    bail!("{}", failed.join("; "))
}

fn remove_plugin(args: &UninstallArgs) -> anyhow::Result<Vec<String>> {
    let was_there = cni_install::plugin(&args.places).exists();
    let changed = cni_install::uninstall(&args.places)?;
    let mut lines: Vec<String> = changed
        .iter()
        .map(|path| format!("{}: the CNI plugin's entry is taken out", path.display()))
        .collect();
    if was_there {
        lines.push(format!("{} removed", cni_install::plugin(&args.places).display()));
    }
    Ok(lines)
}

fn remove_folder(run_dir: &Path) -> anyhow::Result<Vec<String>> {
    match fs::remove_dir_all(run_dir) {
        Ok(()) => Ok(vec![format!("{} removed", run_dir.display())]),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| run_dir.display().to_string()),
    }
}
