//! A subtree of the cgroup-v2 hierarchy: one node's, with a folder for each Pod and one for the agent.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::memory_limit::VERSION_1;
use crate::poll;
use crate::run_id::RunId;

#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// A new folder at the root of the hierarchy.
    ///
    /// # Errors
    /// There is no cgroup-v2 mount, or it may not be written.
    pub fn at_root(name: &str) -> Result<Self> {
        Self::at(mount_point()?.join(name))
    }

    /// A new folder inside this one.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn child(&self, name: &str) -> Result<Self> {
        Self::at(self.path.join(name))
    }

    fn at(path: PathBuf) -> Result<Self> {
        std::fs::create_dir(&path).with_context(|| format!("making the cgroup {}", path.display()))?;
        Ok(Self { path })
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A process that was just killed leaves its cgroup a moment later.
        let _ = poll::until_true("the cgroup is empty", Duration::from_secs(3), || {
            remove_tree(&self.path);
            Ok(!self.path.exists())
        });
    }
}

/// Where the cgroup-v2 hierarchy is mounted; beside version 1 on hybrid machines.
///
/// # Errors
/// It is not mounted.
pub fn mount_point() -> Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").context("reading /proc/self/mounts")?;
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let (_, path, kind) = (fields.next()?, fields.next()?, fields.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(path))
        })
        .next()
        .context("no cgroup-v2 hierarchy is mounted")
}

/// Removes the cgroups of runs that were killed.
pub fn sweep() {
    let roots = mount_point().into_iter().chain([PathBuf::from(VERSION_1)]);
    let entries = roots.filter_map(|root| std::fs::read_dir(root).ok()).flatten().flatten();
    for entry in entries {
        if entry.file_name().to_str().is_some_and(RunId::is_left_behind) {
            remove_tree(&entry.path());
        }
    }
}

/// Leaves first; a cgroup's files go with its folder.
pub(crate) fn remove_tree(path: &Path) {
    if let Ok(entries) = std::fs::read_dir(path) {
        for entry in entries
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        {
            remove_tree(&entry.path());
        }
    }
    let _ = std::fs::remove_dir(path);
}
