//! Where the node's programs attach, if nobody says it: the root of the cgroup-v2 hierarchy, and nothing that only looks like it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::kernel;
use super::network::CaptureError;

/// The id of the hierarchy's root, which is its inode on cgroupfs; every other cgroup has a greater one.
const ROOT_ID: u64 = 1;

/// # Errors
/// None is mounted here; or, in a private cgroup namespace, what looks like the root is the agent's own cgroup, and Pods are not
/// below it.
pub(super) fn detect() -> Result<PathBuf, CaptureError> {
    let root = kernel::detect_cgroup_root()?;
    check(&root)?;
    Ok(root)
}

fn check(root: &Path) -> Result<(), CaptureError> {
    let id = fs::metadata(root)
        .map_err(|error| CaptureError::Other(format!("{}: {error}", root.display())))?
        .ino();
    if id == ROOT_ID {
        return Ok(());
    }
    Err(CaptureError::Refused(format!(
        "{} is cgroup {id}, not the root of the node's cgroup-v2 hierarchy: the agent is in a cgroup namespace of its own; mount \
         the node's hierarchy into it and name its root with --cgroup-root",
        root.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_not_the_root_is_refused_with_the_flag() {
        let folder = tempfile::tempdir().unwrap();
        let error = check(folder.path()).unwrap_err().to_string();
        assert!(error.contains("--cgroup-root"), "{error}");
    }
}
