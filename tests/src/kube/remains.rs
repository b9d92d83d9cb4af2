//! What agents could leave on the nodes of a [`Cluster`] and in Pods, to be compared with what was there before.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use super::load::inside;
use super::shop::PATIENCE;
use super::{Cluster, Node};
use crate::{bpf, poll, snapshot};

const RUN_DIR: &str = "run/culvert";
const BPF: &str = "sys/fs/bpf";
const NETWORKS: &str = "etc/cni/net.d";
/// Version 2 alone, and beside 1.
const CGROUP_ROOTS: [&str; 2] = ["sys/fs/cgroup", "sys/fs/cgroup/unified"];
/// How an agent names those of its probes.
const PROBE_CGROUP: &str = "culvert-probe-";
const PLUGINS: &str = "opt/cni/bin";

/// Of a node's file systems, which go with it should it end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Files {
    pins: Vec<String>,
    has_run_dir: bool,
    /// The runtime's network configurations, whole.
    networks: BTreeMap<String, String>,
    plugins: Vec<String>,
    cgroups: Vec<String>,
    rules: String,
}

/// Of a whole cluster, and of some Pods' network namespaces.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Remains {
    nodes: Vec<Files>,
    pods: BTreeMap<String, String>,
}

impl Remains {
    /// As it is now.
    ///
    /// # Errors
    /// A node is off, or a Pod does not run.
    pub fn of(cluster: &Cluster, pods: &[&str]) -> Result<Self> {
        let in_pod = |pod: &&str| Ok(((*pod).to_owned(), snapshot::at(&inside(cluster, pod)?.netns(cluster)?)?));
        Ok(Self {
            nodes: cluster.nodes().iter().map(files).collect::<Result<_>>()?,
            pods: pods.iter().map(in_pod).collect::<Result<_>>()?,
        })
    }

    /// Of this Pod nothing is compared.
    #[must_use]
    pub fn without(mut self, pod: &str) -> Self {
        self.pods.remove(pod);
        self
    }

    /// Waits for what ends by itself, such as what was just deleted.
    ///
    /// # Errors
    /// Something is not as it was: what.
    pub fn expect_as_before(&self, cluster: &Cluster) -> Result<()> {
        let pods: Vec<&str> = self.pods.keys().map(String::as_str).collect();
        let mut differences = Vec::new();
        poll::until_true("the nodes are as they were", PATIENCE, || {
            differences = self.differences(&Self::of(cluster, &pods)?);
            Ok(differences.is_empty())
        })
        .with_context(|| differences.join("\n"))
    }

    fn differences(&self, now: &Self) -> Vec<String> {
        let mut found = Vec::new();
        for (number, (before, after)) in self.nodes.iter().zip(&now.nodes).enumerate() {
            if before != after {
                found.push(format!("node {}: before {before:#?}, after {after:#?}", number + 1));
            }
        }
        for (pod, before) in &self.pods {
            let after = now.pods.get(pod).map(String::as_str).unwrap_or_default();
            let one = |a: &str, b: &str| -> Vec<String> {
                a.lines()
                    .filter(|line| !b.lines().any(|other| other == *line))
                    .map(str::to_owned)
                    .collect()
            };
            let (gone, new) = (one(before, after), one(after, before));
            if !gone.is_empty() || !new.is_empty() {
                found.push(format!("{pod}: gone {gone:#?}, new {new:#?}"));
            }
        }
        found
    }
}

fn files(node: &Node) -> Result<Files> {
    let root = node.root()?;
    let mut pins = Vec::new();
    walk(&root.join(BPF), "", &mut pins)?;
    let networks = names(&root.join(NETWORKS))?.into_iter().map(|name| {
        let text = std::fs::read_to_string(root.join(NETWORKS).join(&name))?;
        Ok((name, text))
    });
    let networks = networks.collect::<Result<_>>()?;
    let rules = [["ip", "rule"].as_slice(), &["ip", "-6", "rule"]].map(|command| node.run(command, poll::SOON)?.ok("ip rule"));
    let mut cgroups = Vec::new();
    for folder in CGROUP_ROOTS
        .map(|folder| root.join(folder))
        .iter()
        .filter(|folder| folder.exists())
    {
        cgroups.extend(names(folder)?.into_iter().filter(|name| name.starts_with(PROBE_CGROUP)));
    }
    Ok(Files {
        pins,
        has_run_dir: root.join(RUN_DIR).exists(),
        networks,
        plugins: names(&root.join(PLUGINS))?,
        cgroups,
        rules: rules.into_iter().collect::<Result<Vec<_>>>()?.concat(),
    })
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    Ok(names)
}

fn walk(folder: &Path, prefix: &str, found: &mut Vec<String>) -> Result<()> {
    for name in names(folder)? {
        let path = format!("{prefix}/{name}");
        let entry = folder.join(&name);
        if entry.is_dir() {
            walk(&entry, &path, found)?;
        }
        found.push(path);
    }
    Ok(())
}

/// Folders there hold links, or another version's maps.
fn maps_in(folder: &Path) -> Result<Vec<OwnedFd>> {
    let pins = names(folder)?.into_iter().map(|name| folder.join(name));
    pins.filter(|pin| !pin.is_dir()).map(|pin| bpf::open(&pin)).collect()
}

/// The kernel's half of the mesh on a node, held by its maps: whether any program or link uses one is seen also when every pin is gone.
#[derive(Debug)]
pub struct KernelHalf(Vec<OwnedFd>);

impl KernelHalf {
    /// Of each node, where there is one by now.
    ///
    /// # Errors
    /// A node has no maps of it, or no program and link that uses them.
    pub fn of_all(cluster: &Cluster) -> Result<Vec<Self>> {
        cluster.nodes().iter().map(Self::of).collect()
    }

    /// As [`KernelHalf::of_all`], of one node.
    ///
    /// # Errors
    /// As there.
    pub fn of(node: &Node) -> Result<Self> {
        let folder = node.root()?.join(BPF).join("culvert");
        let mut maps = Vec::new();
        for version in names(&folder)? {
            let version = folder.join(version);
            maps.extend(maps_in(&version)?);
            for own in names(&version)?.iter().filter(|name| name.starts_with("abi")) {
                maps.extend(maps_in(&version.join(own))?);
            }
        }
        let half = Self(maps);
        let (programs, links) = half.users()?;
        ensure!(
            programs > 0 && links > 0,
            "{}: expected programs and links that use the mesh's maps, saw {programs} and {links}",
            node.name()
        );
        Ok(half)
    }

    /// Programs, and their links.
    fn users(&self) -> Result<(usize, usize)> {
        let users = self.0.iter().map(bpf::users).collect::<Result<Vec<_>>>()?;
        Ok(users.into_iter().fold((0, 0), |sum, each| (sum.0 + each.0, sum.1 + each.1)))
    }

    /// # Errors
    /// Some are left.
    pub fn expect_none(&self) -> Result<()> {
        poll::until_true("programs and links of the mesh are gone", PATIENCE, || {
            Ok(self.users()? == (0, 0))
        })
        .with_context(|| format!("programs and links, as maps have them: {:?}", self.users()))
    }
}
