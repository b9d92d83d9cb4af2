//! The cgroup hierarchies of this machine: version 2 alone, or beside those of version 1. They are mounted where they are
//! needed, in a mount namespace of one thread, and so it does not matter where (or whether) the machine has them mounted.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::cgroup;
use crate::poll;
use crate::run_id::RunId;

/// On most machines; here a node has its controllers.
pub(super) const VERSION_2_BESIDE_1: &str = "unified";

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hierarchy {
    /// The folder's name below /sys/fs/cgroup, where there are several.
    pub name: String,
    /// How version 1 is mounted.
    options: Option<String>,
}

impl Hierarchy {
    pub(super) fn is_version_1(&self) -> bool {
        self.options.is_some()
    }

    pub(super) fn mount_at(&self, path: &Path) -> Result<()> {
        let kind = if self.is_version_1() { "cgroup" } else { "cgroup2" };
        mount(Some(kind), path, Some(kind), MsFlags::empty(), self.options.as_deref())
            .with_context(|| format!("mounting the cgroup hierarchy {} at {}", self.name, path.display()))
    }
}

/// All that this machine has.
pub(super) fn all() -> Result<Vec<Hierarchy>> {
    let text = std::fs::read_to_string("/proc/self/cgroup").context("reading /proc/self/cgroup")?;
    text.lines().map(parse).collect()
}

/// A line of /proc/self/cgroup: "4:cpu,cpuacct:/user", "1:name=systemd:/" or "0::/".
fn parse(line: &str) -> Result<Hierarchy> {
    let mut fields = line.splitn(3, ':').skip(1);
    let controllers = fields.next().with_context(|| format!("/proc/self/cgroup: {line:?}"))?;
    Ok(match controllers.strip_prefix("name=") {
        Some(name) => Hierarchy {
            name: name.to_owned(),
            options: Some(format!("none,{controllers}")),
        },
        None if controllers.is_empty() => Hierarchy {
            name: VERSION_2_BESIDE_1.to_owned(),
            options: None,
        },
        None => Hierarchy {
            name: controllers.to_owned(),
            options: Some(controllers.to_owned()),
        },
    })
}

/// Mounts all of them below `scratch`, which is covered by a file system of its own. For a mount namespace of one's own.
pub(super) fn mount_below(scratch: &Path) -> Result<Vec<(Hierarchy, PathBuf)>> {
    mount(
        Some("tmpfs"),
        scratch,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=0755,size=64k"),
    )
    .with_context(|| format!("mounting a tmpfs at {}", scratch.display()))?;
    all()?
        .into_iter()
        .map(|hierarchy| {
            let path = scratch.join(&hierarchy.name);
            std::fs::create_dir(&path)?;
            hierarchy.mount_at(&path)?;
            Ok((hierarchy, path))
        })
        .collect()
}

/// A new mount namespace, from which nothing gets out.
pub(super) fn leave_mounts() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace")?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .context("making mounts private")
}

/// Runs `f` with the roots of all hierarchies, on a thread that sees them mounted.
fn with_roots<T: Send>(f: impl FnOnce(&[PathBuf]) -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        scope
            .spawn(move || {
                leave_mounts()?;
                // Any folder will do: nobody else sees what is mounted on it.
                let roots = mount_below(&std::env::temp_dir())?;
                let roots: Vec<PathBuf> = roots.into_iter().map(|(_, path)| path).collect();
                f(&roots)
            })
            .join()
            .unwrap_or_else(|_| bail!("the thread with the cgroup hierarchies panicked"))
    })
}

/// A node's cgroups, of the same name in every hierarchy. The node makes them when it starts, and fills them.
#[derive(Debug)]
pub(super) struct NodeCgroups(pub String);

impl NodeCgroups {
    /// Those that are there, by their paths.
    pub(super) fn present(&self) -> Result<Vec<PathBuf>> {
        with_roots(|roots| {
            let paths = roots.iter().map(|root| root.join(&self.0));
            Ok(paths.filter(|path| path.exists()).collect())
        })
    }

    pub(super) fn remove(&self) -> Result<()> {
        with_roots(|roots| {
            // A process that was just killed leaves its cgroup a moment later.
            poll::until_true("the node's cgroups are empty", Duration::from_secs(5), || {
                let paths: Vec<PathBuf> = roots.iter().map(|root| root.join(&self.0)).collect();
                paths.iter().for_each(|path| cgroup::remove_tree(path));
                Ok(paths.iter().all(|path| !path.exists()))
            })
        })
    }
}

impl Drop for NodeCgroups {
    fn drop(&mut self) {
        let _ = self.remove();
    }
}

/// Removes the cgroups of nodes whose run was killed.
pub(super) fn sweep() {
    let _ = with_roots(|roots| {
        let entries = roots.iter().filter_map(|root| std::fs::read_dir(root).ok());
        for entry in entries.flatten().flatten() {
            if entry.file_name().to_str().is_some_and(RunId::is_left_behind) {
                cgroup::remove_tree(&entry.path());
            }
        }
        Ok(())
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_told_apart() {
        let named = |name: &str, options: Option<&str>| Hierarchy {
            name: name.to_owned(),
            options: options.map(str::to_owned),
        };
        let cases = [
            ("0::/", named("unified", None)),
            ("4:cpu,cpuacct:/user:odd", named("cpu,cpuacct", Some("cpu,cpuacct"))),
            ("1:name=systemd:/", named("systemd", Some("none,name=systemd"))),
        ];
        for (line, wanted) in cases {
            assert_eq!(parse(line).unwrap(), wanted, "{line}");
        }
        assert!(parse("nonsense").is_err());
    }
}
