//! Where things are, and cargo on them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::{ebpf, tools};

pub struct Workspace {
    pub root: PathBuf,
    pub target: PathBuf,
}

impl Workspace {
    pub fn find() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("xtask lies in the workspace")?
            .to_owned();
        // Cargo takes a relative path from where it was started.
        let target = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(path) => std::path::absolute(path)?,
            None => root.join("target"),
        };
        Ok(Self { root, target })
    }

    /// Cargo in the workspace.
    pub fn cargo(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command
            .args(arguments)
            .current_dir(&self.root)
            .env("CARGO_TARGET_DIR", &self.target);
        command
    }

    /// Builds the kernel programs and then these packages with them; answers the folder of the binaries.
    pub fn build(&self, packages: &[&str]) -> Result<PathBuf> {
        let object = ebpf::object(self)?;
        let mut arguments = vec!["build", "--locked", "--bins"];
        for package in packages {
            arguments.extend(["--package", package]);
        }
        tools::run(self.cargo(&arguments).env(ebpf::OBJECT_VARIABLE, object))?;
        Ok(self.binaries())
    }

    pub fn has_integration_tests(&self, package: &str) -> bool {
        let folder = self.root.join(package).join("tests");
        std::fs::read_dir(folder).is_ok_and(|entries| {
            entries
                .flatten()
                .any(|entry| entry.path().extension().is_some_and(|kind| kind == "rs"))
        })
    }

    pub fn binaries(&self) -> PathBuf {
        self.target.join("debug")
    }
}
