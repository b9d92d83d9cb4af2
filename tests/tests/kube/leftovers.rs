//! What belongs to a cluster on this machine, found without its help; and that nothing of it is left at the end.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::kube::{self, Cluster};
use mesh_tests::poll::{self, SOON};
use mesh_tests::process::Conversation;

use super::Bed;

/// Namespaces, mounts, folders, interfaces; processes by their mounts and command lines; the nodes' cgroups by their names.
#[derive(Debug, Default)]
struct Belongings {
    netns: Vec<String>,
    folder: bool,
    mounts: Vec<String>,
    processes: Vec<String>,
    cgroups: Vec<String>,
}

/// In the environment of this very program: it is a second copy, and does no more than live.
pub const VICTIM: &str = "CULVERT_KUBE_VICTIM";
/// As long as a cluster takes on a busy machine.
const VICTIM_DEADLINE: Duration = Duration::from_secs(240);

/// Tells its cluster's name and folder, and holds it until it is killed.
pub fn be_the_victim() -> ExitCode {
    match Cluster::start(1) {
        Ok(cluster) => {
            println!("{} {}", cluster.id(), cluster.folder().display());
            loop {
                std::thread::park();
            }
        }
        Err(error) => {
            println!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// With the same addresses and names of nodes as the first one, whose nodes stay as they were.
pub fn killed(bed: &mut Bed) -> Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command.env(VICTIM, "1");
    let victim = Conversation::start(command)?;
    let said = victim.hear(VICTIM_DEADLINE)?;
    let (id, folder) = said
        .split_once(' ')
        .with_context(|| format!("the second copy said {said:?}"))?;
    let folder = Path::new(folder);
    let during = belongings(id, folder)?;
    ensure!(
        during.netns.len() == 2 && during.processes.len() > 5 && !during.cgroups.is_empty(),
        "{during:?}"
    );
    let first = bed.as_ref().context("the cluster was ended by the last check")?;
    super::expect_answer(first, "http://far/", "far")?;
    // Held by the second, the first one's namespaces would not end with it.
    let first = first.id().to_string();
    let pids = during.processes.iter().filter_map(|process| process.split(' ').next());
    let held: Vec<String> = pids.flat_map(|pid| own_mounts(pid, &first)).collect();
    ensure!(held.is_empty(), "the second copy's nodes have mounts of the first: {held:?}");
    // `kill -9`, and so without a Drop.
    drop(victim);
    poll::until_true("the processes of a copy that was killed end", SOON, || {
        Ok(belongings(id, folder)?.processes.is_empty())
    })?;
    let left = belongings(id, folder)?;
    ensure!(!left.netns.is_empty() && left.folder, "there was nothing to sweep: {left:?}");
    kube::sweep();
    let after = belongings(id, folder)?;
    ensure!(after.is_empty(), "left behind: {after:#?}");
    let first = bed.as_ref().context("the cluster was ended by the last check")?;
    super::expect_answer(first, "http://far/", "far")
}

pub fn nothing_is_left(bed: &mut Bed) -> Result<()> {
    let links = interfaces()?;
    let cluster = match bed.take() {
        Some(cluster) => cluster,
        None => Cluster::start(1)?,
    };
    let (id, folder) = (cluster.id().to_string(), cluster.folder().to_owned());
    let nodes = cluster.nodes().len();
    let of_nodes: Vec<_> = cluster.nodes().iter().map(kube::Node::cgroups).collect::<Result<_>>()?;
    let during = belongings(&id, &folder)?;
    // That the search finds what is there: control plane and nodes; first processes, kubelets, containers.
    ensure!(during.netns.len() == nodes + 1 && during.folder, "{during:?}");
    ensure!(during.processes.len() > 5 * nodes, "{during:?}");
    ensure!(during.cgroups.len() >= nodes, "{during:?}");
    ensure!(of_nodes.iter().all(|paths| !paths.is_empty()), "{of_nodes:?}");
    drop(cluster);
    let after = belongings(&id, &folder)?;
    ensure!(
        after.netns.is_empty()
            && !after.folder
            && after.mounts.is_empty()
            && after.processes.is_empty()
            && after.cgroups.is_empty(),
        "left behind: {after:#?}"
    );
    let more: Vec<_> = interfaces()?.difference(&links).cloned().collect();
    ensure!(
        more.is_empty(),
        "interfaces on this machine that were not there before: {more:?}"
    );
    Ok(())
}

impl Belongings {
    fn is_empty(&self) -> bool {
        let lists = [&self.netns, &self.mounts, &self.processes, &self.cgroups];
        !self.folder && lists.iter().all(|list| list.is_empty())
    }
}

fn belongings(id: &str, folder: &Path) -> Result<Belongings> {
    let mut found = Belongings {
        netns: names_in("/run/netns").into_iter().filter(|name| name.contains(id)).collect(),
        folder: folder.exists(),
        mounts: lines_with("/proc/self/mountinfo", id),
        ..Belongings::default()
    };
    for pid in names_in("/proc").into_iter().filter(|name| name.parse::<u32>().is_ok()) {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        // A node keeps its files in the run's folder.
        if !own_mounts(&pid, &format!("/{id}/")).is_empty() || command.contains(id) {
            found.processes.push(format!("{pid} {command}"));
        }
    }
    // The machine's own view of the hierarchies, where it has one.
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    for line in mounts.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        if let [_, path, "cgroup" | "cgroup2", ..] = fields.as_slice() {
            let names = names_in(path).into_iter().filter(|name| name.contains(id));
            found.cgroups.extend(names.map(|name| format!("{path}/{name}")));
        }
    }
    Ok(found)
}

/// With `text` in them. A process in this one's mount namespace has none of its own.
fn own_mounts(pid: &str, text: &str) -> Vec<String> {
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    if namespace(pid) == namespace("self") {
        return Vec::new();
    }
    lines_with(&format!("/proc/{pid}/mountinfo"), text)
}

fn names_in(folder: &str) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn lines_with(file: &str, text: &str) -> Vec<String> {
    let content = std::fs::read_to_string(file).unwrap_or_default();
    content
        .lines()
        .filter(|line| line.contains(text))
        .map(str::to_owned)
        .collect()
}

fn interfaces() -> Result<BTreeSet<String>> {
    Ok(names_in("/sys/class/net").into_iter().collect())
}
