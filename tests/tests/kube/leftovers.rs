//! What belongs to a cluster on this machine, found without its help; and that nothing of it is left at the end.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Result, ensure};
use mesh_tests::kube::Cluster;

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

pub fn nothing_is_left(bed: &mut Bed) -> Result<()> {
    let links = interfaces()?;
    let cluster = match bed.take() {
        Some(cluster) => cluster,
        None => Cluster::start(1)?,
    };
    let (id, folder) = (cluster.id().to_string(), cluster.folder().to_owned());
    let nodes = cluster.nodes().len();
    let of_nodes: Vec<_> = cluster
        .nodes()
        .iter()
        .map(mesh_tests::kube::Node::cgroups)
        .collect::<Result<_>>()?;
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

fn belongings(id: &str, folder: &Path) -> Result<Belongings> {
    let mut found = Belongings {
        netns: names_in("/run/netns").into_iter().filter(|name| name.contains(id)).collect(),
        folder: folder.exists(),
        mounts: lines_with("/proc/self/mountinfo", id),
        ..Belongings::default()
    };
    let own = std::process::id().to_string();
    for pid in names_in("/proc")
        .into_iter()
        .filter(|name| name.parse::<u32>().is_ok() && *name != own)
    {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        if command.contains(id) || !lines_with(&format!("/proc/{pid}/mountinfo"), id).is_empty() {
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
