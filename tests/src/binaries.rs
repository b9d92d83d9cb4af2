//! Where the binaries under test are. `cargo xtask` builds them and says so by environment.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

pub const BIN_DIR_VARIABLE: &str = "CULVERT_BIN_DIR";

/// Of the build with another eBPF ABI version.
pub const OTHER_BIN_DIR_VARIABLE: &str = "CULVERT_OTHER_BIN_DIR";

/// Where the images of `cargo xtask images` are, of either build.
pub const IMAGE_DIR_VARIABLE: &str = "CULVERT_IMAGE_DIR";
pub const OTHER_IMAGE_DIR_VARIABLE: &str = "CULVERT_OTHER_IMAGE_DIR";

/// Two builds that an upgrade goes between.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Build {
    /// This checkout's.
    #[default]
    This,
    /// The same with another ABI version, layouts and messages: xtask/src/other_build.rs.
    Other,
}

impl Build {
    /// Its eBPF ABI version.
    #[must_use]
    pub fn abi_version(self) -> u32 {
        match self {
            Self::This => mesh_common::ABI_VERSION,
            Self::Other => mesh_common::ABI_VERSION + 1,
        }
    }

    /// Its image of this name, as an archive.
    ///
    /// # Errors
    /// The variable that names the folder is not set (only `cargo xtask test kube` does), or the folder lacks it.
    pub fn image(self, name: &str) -> Result<PathBuf> {
        let variable = match self {
            Self::This => IMAGE_DIR_VARIABLE,
            Self::Other => OTHER_IMAGE_DIR_VARIABLE,
        };
        within(variable, &format!("{name}.tar"))
    }

    /// # Errors
    /// The variable that names the build's folder is not set, or the folder lacks the binary.
    pub fn path(self, name: &str) -> Result<PathBuf> {
        match self {
            Self::This => path(name),
            Self::Other => within(OTHER_BIN_DIR_VARIABLE, name),
        }
    }
}

/// # Errors
/// `CULVERT_BIN_DIR` is not set, or lacks the binary.
pub fn path(name: &str) -> Result<PathBuf> {
    within(BIN_DIR_VARIABLE, name)
}

fn within(variable: &str, name: &str) -> Result<PathBuf> {
    let folder = std::env::var_os(variable)
        .with_context(|| format!("{variable} is not set (run this by `cargo xtask test` or `cargo xtask demo`)"))?;
    let path = PathBuf::from(folder).join(name);
    if !path.is_file() {
        bail!("{} does not exist", path.display());
    }
    Ok(path)
}
