//! Where the programs are. `cargo xtask test kube` builds them and says so by environment.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

pub const DIR_VARIABLE: &str = "CULVERT_KUBE_DIR";

#[derive(Clone, Debug)]
pub struct Tools(PathBuf);

impl Tools {
    /// # Errors
    /// `CULVERT_KUBE_DIR` is not set, or is not what `cargo xtask build-kube` makes.
    pub fn find() -> Result<Self> {
        let folder = std::env::var_os(DIR_VARIABLE).with_context(|| {
            format!(
                "{DIR_VARIABLE} is not set (run this by `cargo xtask test kube`, or set it to what `cargo xtask build-kube` says)"
            )
        })?;
        let tools = Self(PathBuf::from(folder));
        for there in [tools.component("kubelet"), tools.debian("usr/bin/containerd")] {
            ensure!(there.is_file(), "{} does not exist", there.display());
        }
        Ok(tools)
    }

    /// A part of Kubernetes, or CoreDNS.
    #[must_use]
    pub fn component(&self, name: &str) -> PathBuf {
        self.components().join(name)
    }

    #[must_use]
    pub fn components(&self) -> PathBuf {
        self.0.join("bin")
    }

    /// A file or folder of Debian's packages, by its path there.
    #[must_use]
    pub fn debian(&self, path: impl AsRef<Path>) -> PathBuf {
        self.0.join("debian").join(path)
    }
}

/// For a test of Rust's own harness: whether it has to skip itself, which is then said as `cargo xtask test` counts it.
#[must_use]
pub fn is_missing(test: &str) -> bool {
    let why = if nix::unistd::geteuid().is_root() {
        Tools::find().err().map(|error| error.to_string())
    } else {
        Some("root is missing".to_owned())
    };
    if let Some(why) = &why {
        let _ = writeln!(std::io::stdout(), "SKIPPED: {test}: {why}");
    }
    why.is_some()
}
