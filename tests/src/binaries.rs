//! Where the binaries under test are. `cargo xtask` builds them and says so by environment.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

pub const BIN_DIR_VARIABLE: &str = "CULVERT_BIN_DIR";

/// # Errors
/// `CULVERT_BIN_DIR` is not set, or lacks the binary.
pub fn path(name: &str) -> Result<PathBuf> {
    let folder = std::env::var_os(BIN_DIR_VARIABLE)
        .with_context(|| format!("{BIN_DIR_VARIABLE} is not set (run this by `cargo xtask test` or `cargo xtask demo`)"))?;
    let path = PathBuf::from(folder).join(name);
    if !path.is_file() {
        bail!("{} does not exist", path.display());
    }
    Ok(path)
}
