//! A cgroup that holds little memory, for a process that is to run out of it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::{cgroup, poll, suite};

/// Where version 1 of the controller is mounted, on machines that have both.
pub(crate) const VERSION_1: &str = "/sys/fs/cgroup/memory";

#[derive(Debug)]
pub struct MemoryLimit {
    path: PathBuf,
    is_v1: bool,
}

impl MemoryLimit {
    /// In the place of the node's cgroup where there is but one hierarchy; else named after the run's folder, for the sweep.
    ///
    /// # Errors
    /// The machine has no memory controller that may be used: skipped.
    pub fn create(run: &Path, node: &Path) -> Result<Self> {
        let is_v1 = Path::new(VERSION_1).join("memory.limit_in_bytes").exists();
        let path = if is_v1 {
            let mut name = run.file_name().context("the run's folder has a name")?.to_owned();
            name.push("-memory");
            Path::new(VERSION_1).join(name)
        } else {
            for parent in [&cgroup::mount_point()?, node] {
                if std::fs::write(parent.join("cgroup.subtree_control"), "+memory").is_err() {
                    return Err(suite::skip("no memory controller in the cgroups that may be used"));
                }
            }
            node.join("memory")
        };
        std::fs::create_dir(&path).with_context(|| format!("making the cgroup {}", path.display()))?;
        Ok(Self { path, is_v1 })
    }

    /// From now on the process has so many bytes beside what it has already.
    ///
    /// # Errors
    /// It is gone, or the limit is refused.
    pub fn adopt(&self, process: u32, bytes: u64) -> Result<()> {
        let limit = if self.is_v1 { "memory.limit_in_bytes" } else { "memory.max" };
        std::fs::write(self.path.join(limit), bytes.to_string()).context("setting the limit")?;
        std::fs::write(self.path.join("cgroup.procs"), process.to_string()).context("moving the process")
    }

    /// Processes that the kernel killed for want of memory.
    ///
    /// # Errors
    /// The counter cannot be read.
    pub fn kills(&self) -> Result<u64> {
        let file = if self.is_v1 { "memory.oom_control" } else { "memory.events" };
        let text = std::fs::read_to_string(self.path.join(file)).with_context(|| format!("reading {file}"))?;
        let kills = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        kills
            .and_then(|count| count.parse().ok())
            .with_context(|| format!("{file}: {text}"))
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        let _ = poll::until_true("the cgroup is empty", Duration::from_secs(3), || {
            Ok(std::fs::remove_dir(&self.path).is_ok())
        });
    }
}
