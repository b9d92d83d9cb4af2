//! `mesh-agent uninstall`: the node becomes as it was before the mesh.
//!
//! A running agent is taken over as its successor would: until its programs are detached it serves, so that no new connection fails,
//! and then it drains the connections that it carries and never comes back to its Pods. A dead agent's lock is free.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail, ensure};
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
use crate::memory;
use crate::pods::trust_domain;

/// An agent that enrols a Pod at this moment, or starts, is asked again.
const CLAIM_TRIES: u32 = 15;
const CLAIM_RETRY: Duration = Duration::from_secs(1);
/// What was redirected just before the programs went is still to be accepted.
const ACCEPT_GRACE: Duration = Duration::from_millis(300);
/// Between two looks of one that stays.
const LOOK: Duration = Duration::from_secs(5);
/// How the files of their folder `pods` end, beside whole records, which are gone with what they tell of.
const PARTS_OF_RECORDS: [&str; 2] = [".json.new", ".carried"];

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
    let is_clean = Arc::new(Mutex::new(false));
    let Some(ready_socket) = &args.ready_socket else {
        let removed = pass(&args, &is_clean).await;
        tell(&removed, &say)?;
        if removed.lines.is_empty() {
            say("nothing of the mesh is on this node")?;
        }
        return Ok(());
    };
    let mut terminate = signal(SignalKind::terminate())?;
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
        let removed = pass(&args, &is_clean).await;
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

/// Whoever asks is told that the node is not clean as soon as something is found on it.
async fn pass(args: &UninstallArgs, is_clean: &Arc<Mutex<bool>>) -> Removed {
    let mut removed = Removed::default();
    let claim = {
        let (args, is_clean) = (args.clone(), is_clean.clone());
        tokio::task::spawn_blocking(move || claim(&args, &is_clean))
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
    let mut lock = claim.map(Claim::into_lock);
    if lock.is_none() && Kernel::has_pins(&args.pin_path) {
        *is_clean.lock() = false;
        match lock_beside_pins(&args.run_dir) {
            Ok(own) => lock = Some(own),
            Err(error) => {
                removed.failed.push(format!("{error:#}"));
                return removed;
            }
        }
    }
    if removed.from_running {
        tokio::time::sleep(Duration::from_secs(args.drain_seconds)).await;
        // What that agent was about to write when it ended to follow the node.
        removed.note("the CNI plugin", remove_plugin(args));
    }
    if lock.is_some() {
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

/// `None`: no agent has ever run here, or it was cleaned; whatever else is in such a folder is not the mesh's. Blocks.
fn claim(args: &UninstallArgs, is_clean: &Mutex<bool>) -> anyhow::Result<Option<Claim>> {
    if !local::is_of_agents(&args.run_dir) {
        return Ok(None);
    }
    *is_clean.lock() = false;
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

/// Of pins whose agent's folder is gone: an agent that starts meanwhile has the folder before it pins, and is claimed by the next pass.
fn lock_beside_pins(run_dir: &Path) -> anyhow::Result<OwnedFd> {
    let is_anothers = !local::is_of_agents(run_dir) && fs::read_dir(run_dir).is_ok_and(|mut entries| entries.next().is_some());
    ensure!(
        !is_anothers,
        "--run-dir {}: no agent has been there, and what is pinned may be that of one elsewhere",
        run_dir.display()
    );
    Ok(local::lock(run_dir)?.into())
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

/// What agents have made there, and the folder, if nothing else is in it.
fn remove_folder(run_dir: &Path) -> anyhow::Result<Vec<String>> {
    let pods = run_dir.join("pods");
    if let Ok(entries) = fs::read_dir(&pods) {
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if PARTS_OF_RECORDS.iter().any(|ending| name.ends_with(ending)) {
                is_gone(&entry.path(), fs::remove_file(entry.path()))?;
            }
        }
    }
    is_gone(&pods, fs::remove_dir(&pods))?;
    for path in files(run_dir) {
        is_gone(&path, fs::remove_file(&path))?;
    }
    let said = if is_gone(run_dir, fs::remove_dir(run_dir))? {
        "removed"
    } else {
        "stays: there is more in it than the mesh's files, which are removed"
    };
    Ok(vec![format!("{} {said}", run_dir.display())])
}

/// What agents make in their folder, beside the records of their Pods. The lock is last: while it is there, the folder is theirs.
fn files(run_dir: &Path) -> [PathBuf; 10] {
    let [list, memory] = [mesh_cni::protocol::list_path(run_dir), run_dir.join(memory::FILE)];
    [
        run_dir.join(local::SOCKET_FILE),
        run_dir.join(handover::SOCKET_FILE),
        mesh_cni::protocol::socket_path(run_dir),
        cni_install::temporary(&list),
        list,
        memory::new_path(&memory),
        memory,
        run_dir.join(trust_domain::FILE),
        run_dir.join(local::LEAVING_FILE),
        run_dir.join(local::LOCK_FILE),
    ]
}

/// False: a folder in which something is.
fn is_gone(path: &Path, removed: io::Result<()>) -> anyhow::Result<bool> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(false),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).with_context(|| path.display().to_string()),
        _ => Ok(true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::CniPlaces;

    fn bench() -> (tempfile::TempDir, UninstallArgs) {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let args = UninstallArgs {
            run_dir: at("run"),
            pin_path: at("pins"),
            cgroup_root: Some(at("cgroup")),
            sysctl_root: at("sysctl"),
            places: CniPlaces {
                conf_dir: at("net.d"),
                bin_dir: at("bin"),
                namespace_list: None,
            },
            node: None,
            drain_seconds: 0,
            ready_socket: None,
        };
        (folder, args)
    }

    fn names_in(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap().flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[tokio::test]
    async fn a_folder_that_no_agent_has_been_in_is_left_alone() {
        let (_folder, args) = bench();
        let clean = Arc::new(Mutex::new(true));
        fs::create_dir_all(args.run_dir.join("pods")).unwrap();
        fs::write(args.run_dir.join("memory"), "somebody's").unwrap();
        assert_eq!(pass(&args, &clean).await, Removed::default());
        assert_eq!(names_in(&args.run_dir), ["memory", "pods"]);
        assert!(*clean.lock());
    }

    #[test]
    fn whoever_asks_hears_at_once_that_an_agent_is_there_again() {
        let (_folder, args) = bench();
        let clean = Arc::new(Mutex::new(true));
        let agent = local::lock(&args.run_dir).unwrap();
        // It does not wait for the end of the pass.
        let claiming = claim(&args, &clean);
        assert!(claiming.is_err_and(|error| error.to_string().contains("end it first")));
        assert!(!*clean.lock());
        drop(agent);
        *clean.lock() = true;
        assert!(claim(&args, &clean).unwrap().is_some());
        assert!(!*clean.lock());
    }

    #[tokio::test]
    async fn pins_without_a_folder_are_removed_under_its_lock() {
        let (_folder, args) = bench();
        let clean = Arc::new(Mutex::new(true));
        let pins = args.pin_path.join("v1");
        fs::create_dir_all(&pins).unwrap();
        // An agent that has just started, after the folder was looked at.
        let agent = local::lock(&args.run_dir).unwrap();
        assert!(lock_beside_pins(&args.run_dir).is_err());
        drop(agent);
        assert!(lock_beside_pins(&args.run_dir).is_ok());
        fs::remove_dir_all(&args.run_dir).unwrap();

        // Another's folder: whose pins these are nobody can tell.
        fs::create_dir(&args.run_dir).unwrap();
        fs::write(args.run_dir.join("somebodys"), "").unwrap();
        let removed = pass(&args, &clean).await;
        assert!(
            removed.failed.iter().any(|why| why.contains("no agent has been there")),
            "{removed:?}"
        );
        assert!(pins.exists() && !*clean.lock());
        assert_eq!(names_in(&args.run_dir), ["somebodys"]);

        fs::remove_dir_all(&args.run_dir).unwrap();
        let removed = pass(&args, &clean).await;
        assert!(removed.failed.is_empty(), "{removed:?}");
        assert!(!args.pin_path.exists() && !args.run_dir.exists());
        // What is not ours stays there, and is no reason to go on.
        fs::create_dir_all(args.pin_path.join("somebodys")).unwrap();
        assert_eq!(pass(&args, &clean).await, Removed::default());
    }

    #[tokio::test]
    async fn of_an_agents_folder_what_the_mesh_has_made_is_removed() {
        let (_folder, args) = bench();
        let clean = Arc::new(Mutex::new(true));
        for is_shared in [false, true] {
            fs::create_dir_all(args.run_dir.join("pods")).unwrap();
            files(&args.run_dir).iter().for_each(|path| fs::write(path, "").unwrap());
            fs::write(args.run_dir.join("pods/a-1.carried"), "").unwrap();
            if is_shared {
                fs::write(args.run_dir.join("somebodys"), "").unwrap();
            }
            let removed = pass(&args, &clean).await;
            assert!(removed.failed.is_empty(), "{removed:?}");
            assert_eq!(args.run_dir.exists(), is_shared, "{removed:?}");
            assert_eq!(
                removed.lines.iter().any(|line| line.contains("stays")),
                is_shared,
                "{removed:?}"
            );
            if is_shared {
                assert_eq!(names_in(&args.run_dir), ["somebodys"]);
            }
            // From then on it is nobody's of the mesh.
            assert_eq!(pass(&args, &clean).await, Removed::default());
        }
    }

    #[tokio::test]
    async fn a_node_with_a_record_that_cannot_be_read_is_not_clean() {
        let (_folder, args) = bench();
        let clean = Arc::new(Mutex::new(true));
        drop(local::lock(&args.run_dir).unwrap());
        let record = args.run_dir.join("pods/a-1.json");
        fs::create_dir(args.run_dir.join("pods")).unwrap();
        fs::write(&record, "{").unwrap();
        let removed = pass(&args, &clean).await;
        assert!(removed.failed.iter().any(|why| why.contains("a-1.json")), "{removed:?}");
        assert!(record.exists());
        fs::remove_file(&record).unwrap();
        assert_eq!(pass(&args, &clean).await.failed, Vec::<String>::new());
        assert!(!args.run_dir.exists());
    }
}
