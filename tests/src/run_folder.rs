//! The temporary folder of one run, and the removal of those whose run was killed.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use nix::mount::{MntFlags, umount2};

use crate::run_id::RunId;

/// Traversable by anyone. With `CULVERT_KEEP` in the environment it stays, for inspection.
#[derive(Debug)]
pub struct RunFolder(PathBuf);

impl RunFolder {
    /// # Errors
    /// It cannot be made.
    pub fn create(path: PathBuf) -> Result<Self> {
        std::fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self(path))
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        if std::env::var_os("CULVERT_KEEP").is_none() {
            let _ = std::fs::remove_dir_all(&self.0);
        }
        let _ = std::fs::remove_dir(RunId::base());
    }
}

/// Removes the folders of runs that were killed; `mounts` are those that a run may have made in its folder.
pub fn sweep(mounts: &[String]) {
    let Ok(entries) = std::fs::read_dir(RunId::base()) else {
        return;
    };
    for entry in entries
        .flatten()
        .filter(|entry| entry.file_name().to_str().is_some_and(RunId::is_left_behind))
    {
        for mounted in mounts {
            let _ = umount2(&entry.path().join(mounted), MntFlags::MNT_DETACH);
        }
        let _ = Command::new("rm")
            .args(["-rf", "--one-file-system", "--"])
            .arg(entry.path())
            .status();
    }
}
