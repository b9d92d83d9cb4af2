//! The root of the cgroup-v2 hierarchy, which the programs of a node are attached to.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::{CaptureError, failed};

pub(super) fn open_cgroup_root(path: &Path) -> Result<File, CaptureError> {
    let file_system = statfs(path).map_err(|error| failed(path.display(), error))?;
    if file_system.filesystem_type() != CGROUP2_SUPER_MAGIC {
        return Err(CaptureError::Other(format!(
            "{} is not in a cgroup-v2 hierarchy",
            path.display()
        )));
    }
    File::open(path).map_err(|error| failed(path.display(), error))
}

pub(in crate::capture) fn detect_cgroup_root() -> Result<PathBuf, CaptureError> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|error| failed("/proc/self/mountinfo", error))?;
    cgroup2_mount(&mounts).ok_or_else(|| {
        CaptureError::Other("no cgroup-v2 hierarchy is mounted; mount one (`mount -t cgroup2 none DIR`) or give its root".into())
    })
}

/// The mount point of the cgroup-v2 root in a mountinfo (proc_pid_mountinfo(5)): /sys/fs/cgroup, or on a machine that also
/// has version 1 commonly /sys/fs/cgroup/unified.
pub(super) fn cgroup2_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        let is_root = root == "/" && file_system.split(' ').next() == Some("cgroup2");
        is_root.then(|| PathBuf::from(point.replace("\\040", " ")))
    })
}
