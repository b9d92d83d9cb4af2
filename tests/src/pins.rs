//! What the agents of a node have pinned, below the folder that they were given.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::binaries::Build;
use crate::poll;

/// All of the storage version that both builds have.
#[must_use]
pub fn folder(pin_path: &Path) -> PathBuf {
    pin_path.join(format!("v{}", mesh_common::STORAGE_VERSION))
}

/// The maps that a build has for itself.
#[must_use]
pub fn own_folder(pin_path: &Path, build: Build) -> PathBuf {
    folder(pin_path).join(format!("abi{}", build.abi_version()))
}

/// Waits until of all ABI versions' maps only this build's are pinned: its agent serves, and nobody else does but to drain.
///
/// # Errors
/// Not in time: which are.
pub fn until_alone(pin_path: &Path, build: Build, deadline: Duration) -> Result<()> {
    let own = own_folder(pin_path, build);
    let mut last = Vec::new();
    poll::until_true("the other version's maps are gone", deadline, || {
        let entries = std::fs::read_dir(folder(pin_path))?;
        let paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        let is_of_abi = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("abi"));
        last = paths.into_iter().filter(is_of_abi).collect();
        Ok(last == [own.clone()])
    })
    .with_context(|| format!("{last:?} are there"))
}
