//! A disk that is full, on demand: a small tmpfs.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Where a run's own disk is mounted, below its folder; the sweep of runs that were killed knows it.
pub(crate) const FOLDER: &str = "disk";

#[derive(Debug)]
pub struct Disk(PathBuf);

impl Disk {
    /// At the run's own place for it.
    ///
    /// # Errors
    /// It cannot be mounted.
    pub fn create(run: &Path, bytes: u64) -> Result<Self> {
        let path = run.join(FOLDER);
        std::fs::create_dir_all(&path)?;
        Self::mount_at(path, bytes)
    }

    /// Over a folder that is there, which is seen again afterwards.
    ///
    /// # Errors
    /// It cannot be mounted.
    pub fn mount_at(path: PathBuf, bytes: u64) -> Result<Self> {
        let options = format!("size={bytes},mode=0700");
        mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
            .with_context(|| format!("mounting a tmpfs at {}", path.display()))?;
        Ok(Self(path))
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Until not a byte more goes on it.
    ///
    /// # Errors
    /// It is not for want of room that a write fails.
    pub fn fill(&self) -> Result<()> {
        let mut file = File::create(self.filler())?;
        loop {
            match file.write_all(&[0; 4096]) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// # Errors
    /// It was not filled.
    pub fn make_room(&self) -> Result<()> {
        Ok(std::fs::remove_file(self.filler())?)
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}
